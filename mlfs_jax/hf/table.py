"""What a family's table says, and how a weight is laid out on the Hugging Face side.

A table maps our *sites* (``layers.q``) to Hugging Face *modules* (``encoder.layer.{layer}.attention.self.query``).
The layout of every tensor follows from the names of our axes alone, so no table says how to transpose anything:
``layers`` is unstacked into ``{layer}``, ``head_dim`` is merged into the axis before it, a ``kernel`` [in, out]
becomes a ``weight`` [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlfs_jax.backbone.tree import STACKED

LEAVES = {"kernel": "weight", "table": "weight", "scale": "weight", "bias": "bias"}
"""Our leaf name -> Hugging Face's."""

LEGACY = {".gamma": ".weight", ".beta": ".bias"}
"""How TensorFlow-era checkpoints spell the two leaves of a LayerNorm."""


@dataclass(frozen=True)
class Family:
    """Everything Hugging Face-specific about one family.

    Attributes:
        name: its ``model_type``.
        prefix: name of the base model inside a model with a head ("bert."); a checkpoint may leave it out.
        fields: our config field -> (theirs, its default when config.json leaves it out).
        implied: fields that follow from the others or are fixed in this family.
        modules: backbone site -> module of the base model.
        heads: head kind -> site -> module. A module inside the base model is written with ``prefix``: any head that
            claims it may take it from any checkpoint (BERT's pooler is its sequence head's ``dense``).
        head_activation: head kind -> nonlinearity in the head; None: the config's own.
        architectures: head kind -> class name.
        reads_as: further class names that hold the weights of a head kind.
        tied: key -> our weight that it repeats; accepted in a checkpoint only when equal.
        foreign: modules of heads that are not built here; known, so dropped with a word instead of refused.
        buffers: keys that are no parameters.
    """

    name: str
    prefix: str
    fields: Mapping[str, tuple[str, object]]
    modules: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]
    architectures: Mapping[str, str]
    head_activation: Mapping[str, str | None]
    reads_as: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[dict], dict] = lambda values: {}
    tied: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def module(self, site: str, head: str) -> str:
        """The module of one of our sites, as a model with ``head`` names it (base model: without prefix)."""
        if site in self.heads[head]:
            module = self.heads[head][site]
        else:
            module = self.prefix + self.modules[site]
        return self.bare(module) if head == "none" else module

    def keys(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...], head: str) -> list[str]:
        """The keys that hold our weight ``name``: one, or one per layer when it is stacked."""
        site, _, leaf = name.rpartition(".")
        key = f"{self.module(site, head)}.{LEAVES[leaf]}"
        return [key.format(layer=i) for i in range(shape[0])] if axes[0] == STACKED else [key]

    def bare(self, key: str) -> str:
        """A key or module without the base model's prefix."""
        return key.removeprefix(self.prefix)

    def canonical(self, key: str) -> str:
        """One spelling per tensor: no base prefix, no legacy leaf names."""
        key = self.bare(key)
        for old, new in LEGACY.items():
            if key.endswith(old):
                return key.removesuffix(old) + new
        return key

    def own_head(self, architectures: list[str] | None) -> str | None:
        """The head kind of a checkpoint's own class; None when it has none that is built here."""
        kinds = {arch: kind for kind, arch in self.architectures.items()} | dict(self.reads_as)
        return kinds.get(architectures[0]) if architectures else None

    def is_foreign(self, canonical: str) -> bool:
        """Whether a key belongs to some head of this family (or to its tied copy), built here or not."""
        modules = {self.bare(m) for head in self.heads.values() for m in head.values()} | {*self.foreign}
        return canonical in self.tied or any(canonical.startswith(module + ".") for module in modules)


def hf_shape(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of (one layer of) our weight on the Hugging Face side."""
    merged = []
    for axis, size in zip(axes, shape, strict=True):
        if axis == "head_dim":
            merged[-1] *= size
        elif axis != STACKED:
            merged.append(size)
    return tuple(reversed(merged)) if name.endswith(".kernel") else tuple(merged)


def to_ours(name: str, axes: tuple[str, ...], shape: tuple[int, ...], tensors: list[np.ndarray]) -> np.ndarray:
    """Hugging Face tensors (one per layer, or one) -> our weight of the given shape."""
    turned = [tensor.T if name.endswith(".kernel") else tensor for tensor in tensors]
    return np.stack(turned).reshape(shape) if axes[0] == STACKED else turned[0].reshape(shape)


def to_theirs(name: str, axes: tuple[str, ...], weight: np.ndarray) -> list[np.ndarray]:
    """Our weight -> Hugging Face tensors, one per layer or one; the inverse of :func:`to_ours`."""
    layers = list(weight) if axes[0] == STACKED else [weight]
    shape = hf_shape(name, axes, weight.shape)
    if name.endswith(".kernel"):
        return [np.ascontiguousarray(layer.reshape(shape[::-1]).T) for layer in layers]
    return [np.ascontiguousarray(layer.reshape(shape)) for layer in layers]
