"""What a family's table says, and how a weight is laid out on the Hugging Face side.

A table maps our *sites* (``layers.q``) to Hugging Face *modules* (``encoder.layer.{layer}.attention.self.query``).
The layout of every tensor follows from the names of our axes alone, so no table says how to transpose anything:
``layers`` is unstacked into ``{layer}`` (and the heads into ``{head}``, where a module has that), ``head_dim`` is
merged into the heads before it, a ``kernel`` [in, out] becomes a ``weight`` [out, in]. Sites that name the same module
share its tensors, their outputs joined in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from flax import nnx

from mlfs_jax.backbone.tree import STACKED
from mlfs_jax.config import DecoderConfig

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
        modules: backbone site -> module of the base model.
        heads: head kind -> site -> module. A module inside the base model is written with ``prefix``: any head that
            claims it may take it from any checkpoint (BERT's pooler is its sequence head's ``dense``).
        architectures: head kind -> class name.
        reads_as: further class names that hold the weights of a head kind.
        by_head: modules that hold queries, keys and values of one key-value head after the other, instead of all
            queries, all keys, all values.
        in_out: whether the kernels of the layers are stored [in, out] (GPT-2).
        tied: key -> our weight that it repeats; accepted in a checkpoint only when equal.
        foreign: modules of heads that are not built here; known, so dropped with a word instead of refused.
        buffers: patterns of keys that are no parameters.
        renamed: start of a key -> how this table spells it.
    """

    name: str
    prefix: str
    modules: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]
    architectures: Mapping[str, str]
    reads_as: Mapping[str, str] = field(default_factory=dict)
    by_head: tuple[str, ...] = ()
    in_out: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def module(self, site: str, head: str) -> str:
        """The module of one of our sites, as a model with ``head`` names it (base model: without prefix)."""
        if site in self.heads[head]:
            module = self.heads[head][site]
        else:
            module = self.prefix + self.modules[site]
        return self.bare(module) if head == "none" else module

    def keys(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...], head: str) -> list[str]:
        """The keys that hold our weight ``name``: one, or one per layer when it is stacked (or per layer and head)."""
        site, _, leaf = name.rpartition(".")
        key = f"{self.module(site, head)}.{LEAVES[leaf]}"
        layers = range(shape[0]) if axes[0] == STACKED else (None,)
        heads = range(shape[1]) if "{head}" in key else (None,)
        return [key.format(layer=i, head=j) for i in layers for j in heads]

    def slots(self, specs: Mapping[str, nnx.Param], head: str) -> list[Slot]:
        """All tensors of a network whose weights have these ``specs`` (name -> ``.axes``, ``.shape``)."""
        joined: dict[str, list[str]] = {}
        for name in specs:
            site, _, leaf = name.rpartition(".")
            joined.setdefault(f"{self.module(site, head)}.{LEAVES[leaf]}", []).append(name)
        order = list(self.modules)
        slots = []
        for key, names in joined.items():
            if len(names) > 1:
                names.sort(key=lambda name: order.index(name.rpartition(".")[0]))
            first = specs[names[0]]
            slots.append(
                Slot(
                    keys=tuple(self.keys(names[0], first.axes, first.shape, head)),
                    names=tuple(names),
                    axes=tuple(specs[name].axes for name in names),
                    shapes=tuple(specs[name].shape for name in names),
                    unstacked=int(first.axes[0] == STACKED) + int("{head}" in key),
                    by_head=key.removeprefix(self.prefix).rpartition(".")[0] in self.by_head,
                    turned=names[0].endswith(".kernel") and not (self.in_out and first.axes[0] == STACKED),
                )
            )
        return slots

    def bare(self, key: str) -> str:
        """A key or module without the base model's prefix."""
        return key.removeprefix(self.prefix)

    def canonical(self, key: str) -> str:
        """One spelling per tensor: no base prefix, no legacy names."""
        key = self.bare(key)
        for old, new in self.renamed.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        for old, new in LEGACY.items():
            if key.endswith(old):
                return key.removesuffix(old) + new
        return key

    def own_head(self, architectures: list[str] | None) -> str | None:
        """The head kind of a checkpoint's own class; None when it has none that is built here."""
        kinds = {arch: kind for kind, arch in self.architectures.items()} | dict(self.reads_as)
        return kinds.get(architectures[0]) if architectures else None

    def is_buffer(self, canonical: str) -> bool:
        return any(fnmatchcase(canonical, pattern) for pattern in self.buffers)

    def is_foreign(self, canonical: str) -> bool:
        """Whether a key belongs to some head of this family (or to its tied copy), built here or not."""
        modules = {self.bare(m) for head in self.heads.values() for m in head.values()} | {*self.foreign}
        return canonical in self.tied or any(canonical.startswith(module + ".") for module in modules)


@dataclass(frozen=True, kw_only=True)
class EncoderFamily(Family):
    """A family of encoders, whose configs map entry by entry.

    Attributes:
        fields: our config field -> (theirs, its default when config.json leaves it out).
        implied: fields that follow from the others or are fixed in this family.
        head_activation: head kind -> nonlinearity in the head; None: the config's own.
    """

    fields: Mapping[str, tuple[str, Any]]
    head_activation: Mapping[str, str | None]
    implied: Callable[[dict], dict] = lambda values: {}


@dataclass(frozen=True, kw_only=True)
class DecoderFamily(Family):
    """A family of decoders.

    Attributes:
        from_hf: config.json -> our config, with head "lm".
        to_hf: the inverse; what it does not say is found by reading the result back.
        head_rule: what transformers wants of the hidden size: nothing ("free"), a multiple of the heads ("divides"), or
            heads x head_dim ("equal").
        mlp_ratio: the mlp's width over the hidden size, where config.json does not say it (Bloom).
        only: entry of config.json that changes the function -> the only value of it that is built here.
    """

    from_hf: Callable[[Mapping], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict]
    head_rule: str = "free"
    mlp_ratio: int | None = None
    only: Mapping[str, object] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"none": {}, "lm": {"head": "lm_head"}})
    tied: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": "embed.tokens.table"})
    foreign: tuple[str, ...] = ("score", "qa_outputs", "classifier")
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Slot:
    """The tensors of one Hugging Face parameter (one per layer, or one in all) and our weights that they hold.

    Attributes:
        keys: of the tensors.
        names, axes, shapes: of our weights; more than one where a module joins their outputs.
        unstacked: how many of our leading axes (layers, heads) the keys count out.
        by_head: the outputs are joined for each key-value head, not as a whole.
        turned: whether a tensor is [out, in] where ours is [in, out].
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    unstacked: int
    by_head: bool
    turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor."""
        sizes = (*self._part(0)[:-1], sum(self._outputs))
        return sizes[::-1] if self.turned else sizes

    def to_ours(self, tensors: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Our weights from the tensors, which are read one at a time."""
        ours: list[np.ndarray] = []
        for i, tensor in enumerate(tensors):
            parts = self._split(tensor.T if self.turned else tensor)
            if i == 0:
                ours = [np.empty((len(self.keys), *part.shape), part.dtype) for part in parts]
            for weight, part in zip(ours, parts, strict=True):
                weight[i] = part
        return {name: w.reshape(shape) for name, w, shape in zip(self.names, ours, self.shapes, strict=True)}

    def to_theirs(self, weights: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The tensors from our weights; the inverse of :meth:`to_ours`."""
        parts = [weights[name].reshape(len(self.keys), *self._part(i)) for i, name in enumerate(self.names)]
        joined = (self._join([part[i] for part in parts]) for i in range(len(self.keys)))
        return [np.ascontiguousarray(tensor.T if self.turned else tensor) for tensor in joined]

    @property
    def _outputs(self) -> list[int]:
        return [self._part(i)[-1] for i in range(len(self.names))]

    def _part(self, i: int) -> tuple[int, ...]:
        """Shape [in, out] or [out] of our ``i``-th weight in one tensor."""
        return hf_shape("", self.axes[i][self.unstacked :], self.shapes[i][self.unstacked :])

    def _groups(self) -> int:
        """In how many pieces, one after the other, the outputs are joined."""
        if not self.by_head:
            return 1
        shared = next(i for i, axes in enumerate(self.axes) if "kv_heads" in axes)
        return self.shapes[shared][self.axes[shared].index("kv_heads")]

    def _split(self, tensor: np.ndarray) -> list[np.ndarray]:
        if len(self.names) == 1:
            return [tensor]
        groups, lead = self._groups(), tensor.shape[:-1]
        ends = np.cumsum([size // groups for size in self._outputs])[:-1]
        return [part.reshape(*lead, -1) for part in np.split(tensor.reshape(*lead, groups, -1), ends, -1)]

    def _join(self, parts: list[np.ndarray]) -> np.ndarray:
        if len(parts) == 1:
            return parts[0]
        groups, lead = self._groups(), parts[0].shape[:-1]
        return np.concatenate([part.reshape(*lead, groups, -1) for part in parts], -1).reshape(*lead, -1)


def hf_shape(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of (one layer of) our weight on the Hugging Face side."""
    merged: list[int] = []
    for before, axis, size in zip((None, *axes), axes, shape):  # noqa: B905
        if axis == "head_dim" and before in ("heads", "kv_heads"):
            merged[-1] *= size
        elif axis != STACKED:
            merged.append(size)
    return tuple(reversed(merged)) if name.endswith(".kernel") else tuple(merged)


def to_ours(name: str, shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
    """A tensor [out, in] of (one layer of) a weight that shares its module with no other -> ours, of this shape."""
    return (tensor.T if name.endswith(".kernel") else tensor).reshape(shape)


def to_theirs(name: str, axes: tuple[str, ...], weight: np.ndarray) -> list[np.ndarray]:
    """Our weight, if it shares its module with no other -> tensors [out, in], one for each layer (or one in all)."""
    layers = list(weight) if axes[0] == STACKED else [weight]
    shape = hf_shape(name, axes, weight.shape)
    if name.endswith(".kernel"):
        return [np.ascontiguousarray(layer.reshape(shape[::-1]).T) for layer in layers]
    return [np.ascontiguousarray(layer.reshape(shape)) for layer in layers]
