"""Layers whose weights carry the names of their axes.

The names (``layers embed heads head_dim mlp vocab embedding labels ...``) are the only thing that LoRA shapes,
subnet masks, slicing, export and sharding look at: a new architecture declares its axes and gets all five.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.quantised import Quantised
from mlfs_jax.config import Config
from mlfs_jax.errors import ConfigError

Dims = dict[str, int]
"""Axis name -> size, in order."""


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Phi(x), exact. The forward pass keeps the derivative alone: one erf instead of two on the way back."""
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    cdf = 0.5 * (1 + jax.lax.erf(x * 2**-0.5))
    return x * cdf, cdf + x * jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


gelu.defvjp(_gelu_forward, lambda slope, dy: (dy * slope,))

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_context(config: Config, tokens: Int[Array, "B T"]) -> None:
    """Raise ConfigError for a batch wider than the table of positions, in which a lookup would find anything."""
    if tokens.shape[1] > config.context:
        raise ConfigError(
            f"a batch of {tokens.shape[1]} tokens: this {config.family} has positions for {config.context}; cut it."
        )


def real_tokens(batch: dict) -> Bool[Array, "B T"]:
    """Which of a batch's tokens are no padding: all, when it has no ``attention_mask``."""
    mask = batch.get("attention_mask")
    return jnp.ones(batch["input_ids"].shape, bool) if mask is None else mask.astype(bool)


def weight(init, dims: list[tuple[str, int]], rngs: nnx.Rngs, **meta) -> nnx.Param:
    """A parameter of the given shape that knows the names of its axes."""
    axes, shape = tuple(name for name, _ in dims), tuple(size for _, size in dims)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, **meta)


_normal = nnx.initializers.normal(0.02)
_zeros = nnx.initializers.zeros


@jax.custom_vjp
def low_rank(x: Float[Array, "... in"], a: Float[Array, "in R"], b: Float[Array, "R out"]) -> Float[Array, "... out"]:
    """x A B. The rule for its gradient always contracts with the R columns in front: XLA's CPU backend takes up to
    ten times longer for the transposed product, which autodiff would ask for."""
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x, a, b):
    u = jnp.tensordot(x, a, axes=a.ndim - 1)
    return jnp.tensordot(u, b, axes=1), (x, a, b, u)


def _low_rank_backward(kept, dy):
    x, a, b, u = kept
    rank_axis, lead = u.ndim - 1, tuple(range(u.ndim - 1))
    du = jnp.tensordot(dy, b, (tuple(range(rank_axis, dy.ndim)), tuple(range(1, b.ndim))))
    da = jnp.moveaxis(jnp.tensordot(du, x, (lead, lead)), 0, -1)
    return jnp.tensordot(du, a, ((rank_axis,), (a.ndim - 1,))), da, jnp.tensordot(u, dy, (lead, lead))


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Linear(nnx.Module):
    """``y[..., *out] = x[..., *in] . kernel[*in, *out] + bias[*out]``, plus a low-rank pair given at the call.

    ``stack`` puts leading axes before both (the layer axis of a scanned block).
    """

    def __init__(self, dims_in: Dims, dims_out: Dims, *, rngs: nnx.Rngs, stack: Dims | None = None, bias: bool = True):
        stack = stack or {}
        self.n_in = len(dims_in)
        kernel = [*stack.items(), *dims_in.items(), *dims_out.items()]
        self.kernel = weight(_normal, kernel, rngs, inputs=len(dims_in))
        self.bias = weight(_zeros, [*stack.items(), *dims_out.items()], rngs) if bias else None

    def __call__(self, x: Float[Array, "... in"], lora: dict | None = None) -> Float[Array, "... out"]:
        kernel = self.kernel.get_value()
        if isinstance(kernel, Quantised):
            y = kernel.contract(x, self.n_in)
        else:
            y = jnp.tensordot(x, kernel, axes=self.n_in)
        if lora is not None:
            y += low_rank(x, lora["a"], lora["b"])
        return y if self.bias is None else y + self.bias[...]


class Embed(nnx.Module):
    """A table of vectors, ``table[rows, width]``."""

    def __init__(self, rows: Dims, width: Dims, *, rngs: nnx.Rngs):
        self.table = weight(_normal, [*rows.items(), *width.items()], rngs)

    def __call__(self, ids):
        return self.table[...][ids]


class Norm(nnx.Module):
    """LayerNorm, RMSNorm or LayerNorm without parameters, over what a subnet keeps, in fp32.

    ``keep`` is 0/1, of the normalised shape or broadcast to it. Mean and variance divide by the kept count, so that
    the masked norm equals the norm of the physically sliced model; what is dropped comes out as exact zeros.

    Args:
        dims: shape of the scale; the last ``over`` of its axes are normalised together.
        kind: "layer", "rms" or "none" (a "layer" norm that has no parameters).
        offset: added to the scale (Gemma keeps scale - 1).
    """

    def __init__(
        self,
        dims: Dims,
        *,
        eps: float,
        rngs: nnx.Rngs,
        stack: Dims | None = None,
        kind: str = "layer",
        bias: bool = True,
        offset: float = 0.0,
        over: int = 1,
    ):
        shape = [*(stack or {}).items(), *dims.items()]
        self.eps, self.offset, self.centred = eps, offset, kind != "rms"
        self.sizes = tuple(dims.values())[-over:]
        init = nnx.initializers.constant(1.0 - offset)
        self.scale = weight(init, shape, rngs) if kind != "none" else None
        self.bias = weight(_zeros, shape, rngs) if bias and kind != "none" else None

    def __call__(self, x: Float[Array, "... D"], keep: Float[Array, "..."] | None = None) -> Float[Array, "... D"]:
        dtype, x, axes = x.dtype, x.astype(jnp.float32), tuple(range(-len(self.sizes), 0))
        count: int | Array = math.prod(self.sizes)
        if keep is not None:
            keep = jnp.broadcast_to(keep, self.sizes).astype(jnp.float32)
            count, x = keep.sum(), x * keep
        if self.centred:
            x = x - x.sum(axes, keepdims=True) / count
            x = x if keep is None else x * keep
        y = x * jax.lax.rsqrt((x**2).sum(axes, keepdims=True) / count + self.eps)
        if self.scale is not None:
            y = y * (self.scale[...] + self.offset)
        if self.bias is not None:
            y = y + self.bias[...]
        return (y if keep is None else y * keep).astype(dtype)
