"""Base, gate and side network together: the cloud's two halves of a step, and ``forward``, which composes all three.

    cloud_step:   tokens -> f (the last hidden state), p (the gate), a frame of taps            in the cloud
    device_step:  frame -> g                                                                    on the device
    cloud_finish: f, g, sigma -> logits                                                         in the cloud

Each is a pure function; what passes between them are the types of :mod:`spa_jax.seam`. No gradient of the base exists:
whoever trains differentiates with respect to the side's trees alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

import mlfs_jax.model as backbone_model
from mlfs_jax.backbone.cache import Cache
from mlfs_jax.backbone.tree import STACKED, flatten
from mlfs_jax.model import apply_head
from spa_jax.errors import PluginError
from spa_jax.gate import choose, gate_probability
from spa_jax.seam import Frame, Setting
from spa_jax.side import Side, device_step

NORM_EPS = 1e-6


@partial(jax.tree_util.register_dataclass, data_fields=["hidden", "gate", "frame", "cache"], meta_fields=[])
@dataclass(frozen=True)
class CloudState:
    """What the cloud knows after reading T tokens of each text.

    Attributes:
        hidden: f, the last hidden states, what the LM head reads.
        gate: p, how much the token behind each one wants the side network.
        frame: what the side network would have to see.
        cache: the backbone's, with the tokens in it; None if none was given.
    """

    hidden: Float[Array, "B T D"]
    gate: Float[Array, "B T"]
    frame: Frame
    cache: Cache | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "gate", "sigma", "base_logits", "side_logits"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SideOutput:
    """What :func:`forward` gives.

    Attributes:
        logits: [B, T, V] of the setting.
        gate: [B, T], the gate's probability; 1 for a setting without one.
        sigma: [B, T], the gate's choice.
        base_logits: of f alone.
        side_logits: of what the gate chooses when it chooses the side network: f + g, or g alone for S2 and S3.
    """

    logits: Float[Array, "B T V"]
    gate: Float[Array, "B T"]
    sigma: Bool[Array, "B T"]
    base_logits: Float[Array, "B T V"]
    side_logits: Float[Array, "B T V"]


def as_batch(tokens: ArrayLike | Mapping[str, ArrayLike], base: nnx.State | None = None) -> dict[str, Array]:
    """``input_ids`` and ``attention_mask`` from token ids alone, or from a batch that has them."""
    batch = backbone_model.as_inputs(tokens if isinstance(tokens, Mapping) else {"input_ids": tokens}, base)
    ids = batch["input_ids"]
    return {"input_ids": ids, "attention_mask": batch.get("attention_mask", jnp.ones(ids.shape, jnp.int32))}


def unit_rms(taps: Float[Array, "n B T D"]) -> Float[Array, "n B T D"]:
    """Each vector divided by its root mean square."""
    taps = taps.astype(jnp.float32)
    return taps * jax.lax.rsqrt((taps**2).mean(-1, keepdims=True) + NORM_EPS)


def make_frame(out, tapped: tuple[int, ...], real: Bool[Array, "B T"], before: Array | int = 0) -> Frame:
    """The frame of a forward pass of the backbone with taps; ``before``: real tokens of each text before it."""
    if max(tapped) >= len(out.taps):  # jax would take the last layer instead
        raise PluginError(f"tapped layers {tapped}: expected ones below {len(out.taps)}, the layers of this base.")
    taps = jnp.concatenate([out.embedded[None], out.taps[jnp.asarray(tapped)]])
    positions = jnp.maximum(jnp.cumsum(real, 1) - 1, 0) + jnp.reshape(before, (-1, 1))
    return Frame(unit_rms(taps), positions.astype(jnp.int32), real)


@partial(jax.jit, static_argnames=("graphdef", "tapped", "unroll"))
def cloud_step(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    gate: Mapping[str, Array],
    cache: Cache | None,
    batch: Mapping[str, Array],
    *,
    tapped: tuple[int, ...],
    unroll: bool = False,
) -> CloudState:
    """The cloud's first half of a step: read tokens; what the base makes of them, and whether that is enough.

    Args:
        gate: weights of the gate; {} for a setting without one.
        batch: the next tokens, as :func:`mlfs_jax.forward` takes them.
        tapped: which layers' outputs go into the frame, ``side.tapped``.
    """
    batch = as_batch(batch)
    out = backbone_model.forward(graphdef, base, batch, taps=True, cache=cache, logits=False, unroll=unroll)
    before = 0 if cache is None else cache.valid.sum(1)
    frame = make_frame(out, tapped, batch["attention_mask"].astype(bool), before)
    return CloudState(out.hidden, gate_probability(gate, out.hidden), frame, out.cache)


def mix(
    setting: Setting, f: Float[Array, "B T D"], g: Float[Array, "B T D"], sigma: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The hidden state of a setting. Where sigma is 0 it is f itself, bit by bit.

    S1 and S3 have sigma = 1 everywhere.
    """
    return jnp.where(sigma[..., None], f + g if setting.adds else g, f)


@partial(jax.jit, static_argnames=("graphdef", "setting"))
def cloud_finish(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    hidden: Float[Array, "B T D"],
    g: Float[Array, "B T D"],
    sigma: Bool[Array, "B T"],
    *,
    setting: Setting,
) -> Float[Array, "B T V"]:
    """The cloud's second half of a step: logits, by the frozen head, of f and what came back from the device."""
    return apply_head(graphdef, base, mix(Setting.parse(setting), hidden, g, sigma))


def forward(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    side: Side,
    tokens: ArrayLike | Mapping[str, ArrayLike],
    *,
    setting: Setting = Setting.SPA,
    threshold: float | Array = 0.5,
    sigma: Bool[Array, "B T"] | None = None,
    unroll: bool = False,
) -> SideOutput:
    """Logits of every position, in one pass and one process.

    The side network sees every position ("lazy" memory computes the same, piece by piece); with "sparse" memory only
    those the gate chooses, and at the others g is not defined.

    Args:
        tokens: ids [B, T], or a batch with ``input_ids`` and ``attention_mask``, as :func:`mlfs_jax.forward` takes it.
        setting: see :class:`Setting`.
        threshold: of the gate; what it is calibrated to, or 0.5 for the paper's argmax.
        sigma: the choices themselves, instead of the gate's.

    Raises:
        PluginError: the side network was made for a base of another depth.
        ConfigError: there are no ids of two axes, or not of the vocabulary.
    """
    return _forward(
        graphdef,
        base,
        side,
        as_batch(tokens, base),
        setting=Setting.parse(setting),
        threshold=threshold,
        sigma=sigma,
        unroll=unroll,
    )


@partial(jax.jit, static_argnames=("graphdef", "setting", "unroll"))
def _forward(graphdef, base, side: Side, batch, *, setting: Setting, threshold, sigma, unroll) -> SideOutput:
    layers = next(leaf.shape[0] for name, leaf in flatten(base).items() if name.startswith(f"{STACKED}."))
    if layers != side.backbone.layers:
        raise PluginError(f"this side network was made for a base of {side.backbone.layers} layers; this has {layers}.")
    gate = side.gate if setting.gated else {}
    cloud = cloud_step(graphdef, base, gate, None, batch, tapped=side.tapped, unroll=unroll)
    if sigma is None:
        sigma = choose(cloud.gate, threshold if setting.gated else 0.0)
    frame = cloud.frame
    if side.config.memory == "sparse":
        frame = frame.replace(real=frame.real & sigma)
    g, _ = device_step(side, None, frame, unroll=unroll)
    every = jnp.ones_like(sigma)
    finish = partial(cloud_finish, graphdef, base, cloud.hidden, g, setting=setting)
    return SideOutput(
        logits=finish(sigma),
        gate=cloud.gate,
        sigma=sigma,
        base_logits=finish(~every),
        side_logits=finish(every),
    )
