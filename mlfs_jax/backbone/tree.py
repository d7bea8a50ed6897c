"""The trees that meet in a forward pass, and how their leaves are named.

A *base* is an ``nnx.State`` of ``nnx.Param`` leaves, each with the names of its axes. Everything that walks a base
(slicing, importance, export, LoRA shapes) walks it as ``flatten`` shows it: dotted name -> Param.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mlfs_jax.backbone.cache import Cache

STACKED = "layers"
"""Axis over which the blocks of a network are stacked and scanned, and the prefix of their names."""


@partial(jax.tree_util.register_dataclass, data_fields=["embed", "heads", "mlp", "layers"], meta_fields=[])
@dataclass(frozen=True)
class Mask:
    """Which part of the supernet a subnet keeps: data, not code (0/1 vectors; ``layers`` is boolean).

    A registered pytree, so masks of many subnets stack, scan and vmap like any other argument.
    """

    embed: Float[Array, " D"]
    heads: Float[Array, "L N"]
    mlp: Float[Array, "L F"]
    layers: Bool[Array, " L"]

    def per_layer(self, layers: int) -> Mask:
        """The same mask with a leading layer axis on every leaf, for the scan over layers."""
        return Mask(jnp.broadcast_to(self.embed, (layers, *self.embed.shape)), self.heads, self.mlp, self.layers)


MASKED = {"embed": ("embed",), "heads": (STACKED, "heads"), "mlp": (STACKED, "mlp"), "layers": (STACKED,)}
"""The axes of a mask's leaves, by the names that a base gives its own."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "hidden", "taps", "cache", "embedded"], meta_fields=[]
)
@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [B, C] for a sequence head, [B, T, C] or [B, T, V] for a token, masked-LM or LM head, the pooled [B, D]
            of a model that has a pooler and no head, else None.
        hidden: [B, T, D], the last layer's output; of a decoder, behind the final norm: what the head reads.
        taps: [L, B, T, D], every layer's output, when asked for (a skipped layer repeats its input).
        cache: the key-value cache with the new tokens in it, when one was given.
        embedded: [B, T, D], the input to the first layer, beside the taps.
    """

    logits: Array | None
    hidden: Float[Array, "B T D"]
    taps: Float[Array, "L B T D"] | None
    cache: Cache | None = None
    embedded: Float[Array, "B T D"] | None = None


def flatten(base: nnx.State) -> dict[str, nnx.Param]:
    """Dotted name -> Param, e.g. ``"layers.q.kernel"``."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(base)}


def split_axes(kernel: nnx.Param) -> tuple[int, int]:
    """Number of leading (stacked) axes, and index of the first output axis, of a kernel."""
    stacked = int(kernel.axes[0] == STACKED)
    return stacked, stacked + kernel.inputs


def misfit(base: nnx.State, lora: Mapping, mask: Mask | None = None) -> str | None:
    """What in an adapter or a mask is not of this base, in words; None: all of it is."""
    weights = flatten(base)
    if mask is not None:
        sizes = {axis: size for leaf in weights.values() for axis, size in zip(leaf.axes, leaf.shape, strict=True)}
        for name, axes in MASKED.items():
            found, expected = getattr(mask, name).shape, tuple(sizes[axis] for axis in axes)
            if found != expected:
                return f"mask.{name} has shape {found}, not {expected}"
    for site, entry in lora.items():
        if ("a" in entry) != ("b" in entry):
            return f"{site} has half of a pair, {', '.join(entry)}"
        for leaf, value in entry.items():
            name = f"{site}.kernel" if leaf in ("a", "b") else f"{site}.{leaf}"
            if name not in weights:
                return f"there is no {name}"
            expected = weights[name].shape
            if leaf in ("a", "b"):
                stacked, out = split_axes(weights[name])
                rank = value.shape[-1] if leaf == "a" else value.shape[min(stacked, value.ndim - 1)]
                expected = (*expected[:out], rank) if leaf == "a" else (*expected[:stacked], rank, *expected[out:])
            if value.shape != expected:
                return f"{site}/{leaf} has shape {value.shape}, not {expected}"
    return None


def map_named(f: Callable[[str, nnx.Param], Any], base: nnx.State) -> nnx.State:
    """A base of the same structure and axes whose leaf ``name`` holds ``f(name, param)``."""
    flat = nnx.to_flat_state(base)
    return nnx.from_flat_state([(path, leaf.replace(f(".".join(map(str, path)), leaf))) for path, leaf in flat])


def under(tree: Mapping, prefix: str) -> dict:
    """The entries of a ``{dotted name: ...}`` mapping below ``prefix``, with the prefix taken off."""
    return {name[len(prefix) + 1 :]: entry for name, entry in tree.items() if name.startswith(prefix + ".")}


def place_rows(x: Float[Array, "B T D"], where: jax.sharding.Sharding | None) -> Float[Array, "B T D"]:
    """Activations with every example where the batch has it, on a mesh.

    Without it the compiler may follow the weights, which are split along the channels: every device would then hold
    all examples.
    """
    return x if where is None else jax.lax.with_sharding_constraint(x, where)
