"""What attention is made of besides its linear maps: rotary and ALiBi positions, and the product itself."""

from __future__ import annotations

import math
import os
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.config import Rope


def rope_frequencies(rope: Rope) -> tuple[Float[np.ndarray, " half"], float]:
    """Radians a position turns each pair of channels by, [dim / 2], and what cos and sin are multiplied by.

    Plain: theta^(-2i/dim) (RoFormer, arXiv 2104.09864). Stretched: "linear" (arXiv 2306.15595), "llama3" (Llama 3.1:
    wavelengths longer than the old context / low_freq by the factor, shorter than it / high_freq not at all, a ramp
    between), "yarn" (arXiv 2309.00071, section 3).
    """
    plain = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.scaling == "none":
        return plain, 1.0
    stretched = plain / rope.factor
    if rope.scaling == "linear":
        return stretched, 1.0
    if rope.scaling == "llama3":
        rotations = rope.original_positions * plain / (2 * math.pi)
        kept = np.clip((rotations - rope.low_freq) / (rope.high_freq - rope.low_freq), 0, 1)
        return kept * plain + (1 - kept) * stretched, 1.0

    def channel(rotations: float) -> float:
        """The channel pair that turns this many times within the old context."""
        return rope.dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low or 1e-3), 0, 1)
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return ramp * stretched + (1 - ramp) * plain, factor


def rope_tables(rope: Rope, positions: Int[Array, "B T"]) -> Float[Array, "2 B T half"]:
    """cos and sin of every position's angles."""
    frequencies, factor = rope_frequencies(rope)
    angles = positions[..., None] * jnp.asarray(frequencies, jnp.float32)
    return factor * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(
    x: Float[Array, "B T N H"], tables: Float[Array, "2 B T half"], interleaved: bool
) -> Float[Array, "B T N H"]:
    """Turn the first 2 * half channels of every head by their position's angles; the others pass."""
    cos, sin = tables[:, :, :, None].astype(x.dtype)
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def alibi_slopes(heads: int) -> Float[np.ndarray, " N"]:
    """How much each head discounts a key per position of distance (ALiBi, arXiv 2108.12409, and its released code:
    a geometric series for a power of two; the heads beyond it take every second one of the next series)."""
    series = lambda n: 2.0 ** (-8 / n * np.arange(1, n + 1))  # noqa: E731
    power = 2 ** int(math.log2(heads))
    return np.concatenate([series(power), series(2 * power)[::2][: heads - power]]).astype(np.float32)


def _fits_cudnn(q: Array, k: Array) -> bool:
    """Whether cuDNN has a kernel for such heads, on any GPU since Ampere and also for their gradients."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    return q.dtype in (jnp.bfloat16, jnp.float16) and H <= 128 and not (H % 8 or T % 2 or S % 2)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    bias: Float[Array, "B N T S"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N Hv"]:
    """softmax(scale q k + bias) v over the visible keys; N / K query heads share each key-value head.

    ``softcap`` c squashes scores to c tanh(score / c) first (Gemma 2); scores and softmax are in fp32.

    What ``jax.nn.dot_product_attention`` cannot do is written out here, and so is all of it on a CPU: with heads in
    front, and the G T queries that share a key as rows of one matrix, XLA's CPU backend is faster. On a GPU,
    ``MLFS_ATTENTION=cudnn`` in the environment of a process takes cuDNN's fused kernel where it can.
    """
    if softcap is None and q.shape[-1] == v.shape[-1] and jax.default_backend() != "cpu":
        asked = os.environ.get("MLFS_ATTENTION") == "cudnn"
        fused: Literal["cudnn"] | None = "cudnn" if asked and _fits_cudnn(q, k) else None
        bias = bias if bias is None or fused is None else bias.astype(q.dtype)
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=visible[:, None], scale=scale, implementation=fused
        )
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scores = jnp.einsum("BKXH,BKSH->BKXS", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32)
    scores *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.reshape(B, K, G * T, S)
    scores = jnp.where(jnp.tile(visible, (1, G, 1))[:, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("BKXS,BKSV->BKXV", jax.nn.softmax(scores).astype(v.dtype), v)
    return out.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
