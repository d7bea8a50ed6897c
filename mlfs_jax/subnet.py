"""Subnets: which part of the supernet is kept, which choices there are, and what each costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import index

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mlfs_jax.backbone.tree import STACKED, Mask, flatten
from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.errors import ConfigError, SubnetError, unknown
from mlfs_jax.model import abstract, as_key

FRACTIONS = {"two-thirds": 2 / 3, "half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "eighth": 1 / 8}
"""Names of subnets by their share of the maxnet's non-embedding parameters."""


@dataclass(frozen=True)
class Subnet:
    """What is kept, as prefixes of the (importance-ordered) axes.

    Attributes:
        embed: channels of the residual stream.
        heads: attention (query) heads, one number for each kept layer; whole key-value groups.
        mlp: mlp neurons, one number for each kept layer.
        layers: indices of the kept layers, ascending.
    """

    embed: int
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    layers: tuple[int, ...]

    def __post_init__(self):
        for axis in ("heads", "mlp", "layers"):  # lists are no arguments of compiled functions
            values = getattr(self, axis)
            try:
                object.__setattr__(self, axis, tuple(map(index, values)))
            except TypeError as error:
                raise SubnetError(
                    f"{axis} = {values!r}: expected whole numbers, one for each kept layer, such as (2, 2, 2)."
                ) from error
        if not len(self.heads) == len(self.mlp) == len(self.layers) > 0:
            raise SubnetError(
                f"a subnet of {len(self.layers)} layers with {len(self.heads)} head counts and {len(self.mlp)} mlp "
                "widths: expected at least one layer, and one of each for every kept layer."
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise SubnetError(f"layers = {self.layers}: expected indices in ascending order, each once.")

    def __str__(self):
        short = lambda widths: str(widths[0]) if len(set(widths)) == 1 else "/".join(map(str, widths))  # noqa: E731
        return f"embed={self.embed} heads={short(self.heads)} mlp={short(self.mlp)} layers={len(self.layers)}"

    @property
    def depth(self) -> int:
        return len(self.layers)

    @classmethod
    def from_json(cls, saved: Mapping) -> Subnet:
        """What ``dataclasses.asdict`` gave, after a trip through JSON."""
        return cls(**saved)


def check_fits(config: Config, subnet: Subnet) -> None:
    """Raise SubnetError when a subnet is larger than the network, or empty along an axis."""
    limits = (
        ("embed", (subnet.embed,), config.embed),
        ("heads", subnet.heads, config.heads),
        ("mlp", subnet.mlp, config.mlp),
        ("layers", tuple(i + 1 for i in subnet.layers), config.layers),
    )
    for axis, values, limit in limits:
        if min(values) < 1 or max(values) > limit:
            raise SubnetError(f"{axis} = {values} does not fit this model: expected 1 to {limit}.")
    group = kv_group(config)
    if any(heads % group for heads in subnet.heads):
        raise SubnetError(
            f"heads = {subnet.heads}: {group} query heads share each key-value head here, and a subnet keeps or drops "
            f"them together: expected multiples of {group}."
        )


def kv_group(config: Config) -> int:
    """Query heads that are kept or dropped together."""
    return config.kv_group if isinstance(config, DecoderConfig) else 1


def kept_widths(config: Config, embed: int, heads: int, mlp: int) -> dict[str, int]:
    """Axis name -> size in a layer of these widths, for the axes that a subnet shrinks."""
    widths = {"embed": embed, "heads": heads, "mlp": mlp}
    if isinstance(config, DecoderConfig):  # multi-query: the one key-value head stays
        widths["kv_heads"] = heads * config.kv_heads // config.heads if config.kv_heads > 1 else 1
    return widths


def make_mask(config: Config, subnet: Subnet) -> Mask:
    """The 0/1 mask that turns the supernet into ``subnet`` (rows of dropped layers are all ones)."""
    check_fits(config, subnet)
    heads, mlp = np.ones((config.layers, config.heads)), np.ones((config.layers, config.mlp))
    for layer, n, f in zip(subnet.layers, subnet.heads, subnet.mlp, strict=True):
        heads[layer, n:], mlp[layer, f:] = 0, 0
    kept = np.isin(np.arange(config.layers), subnet.layers)
    embed = np.arange(config.embed) < subnet.embed
    as_f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return Mask(as_f32(embed), as_f32(heads), as_f32(mlp), jnp.asarray(kept))


def maxnet(config: Config) -> Subnet:
    """The whole supernet, as a subnet."""
    L = config.layers
    return Subnet(config.embed, (config.heads,) * L, (config.mlp,) * L, tuple(range(L)))


def kept_size(config: Config, axes: tuple[str, ...], shape: tuple[int, ...], subnet: Subnet) -> int:
    """How many numbers of an array with these named axes a subnet keeps."""
    sizes = [(axis, size) for axis, size in zip(axes, shape, strict=True) if axis != STACKED]
    stacked = axes[0] == STACKED
    widths = zip(subnet.heads, subnet.mlp, strict=True) if stacked else [(0, 0)]  # only layers have heads and mlp
    kept = (kept_widths(config, subnet.embed, heads, mlp) for heads, mlp in widths)
    return sum(math.prod(width.get(axis, size) for axis, size in sizes) for width in kept)


def num_params(config: Config, subnet: Subnet | None = None, *, embeddings: bool = False) -> int:
    """Parameters of a subnet (default: of the maxnet), from the named axes.

    ``embeddings`` counts what is as large as the vocabulary, too: the embedding tables and a language model's head.
    """
    subnet = subnet or maxnet(config)
    weights = flatten(abstract(config)[1]).items()
    outside = lambda name: name.startswith("embed.") or (name.startswith("head.") and config.head == "lm")  # noqa: E731
    counted = (leaf for name, leaf in weights if embeddings or not outside(name))
    return sum(kept_size(config, leaf.axes, leaf.shape, subnet) for leaf in counted)


def num_flops(config: Config, subnet: Subnet | None = None, *, length: int = 128) -> int:
    """FLOPs (2 per multiply-add) of the matrix products of one sequence of ``length`` tokens through the layers."""
    subnet = subnet or maxnet(config)
    weights = flatten(abstract(config)[1]).items()
    kernels = (leaf for name, leaf in weights if name.startswith("layers.") and name.endswith(".kernel"))
    products = sum(kept_size(config, leaf.axes, leaf.shape, subnet) for leaf in kernels)
    value = getattr(config, "latent", None)
    sizes = config.head_dim + (value.value if value else config.head_dim)
    return 2 * length * (products + length * sizes * sum(subnet.heads))


@dataclass(frozen=True)
class SubnetSpace:
    """The subnets that a palette is drawn from.

    Attributes:
        config: the supernet.
        embed, heads, mlp, depth: the choices along each axis; the largest of each must be the supernet's own (the
            default: only that).
        vary: "together": heads and mlp shrink by one index, as DynaBERT's width multiplier (so the two lists have
            one length); "independent": each on its own; "per-layer": each on its own in every layer.
        layer_order: layers, most important first: a subnet of depth l keeps the first l. None keeps them evenly
            spaced, as DynaBERT does.
    """

    config: Config
    embed: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    depth: tuple[int, ...] = ()
    vary: str = "together"
    layer_order: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.vary not in ("together", "independent", "per-layer"):
            raise ConfigError(f"vary = {self.vary!r}: expected 'together', 'independent' or 'per-layer'.")
        choices = {axis: tuple(getattr(self, axis)) or (top,) for axis, top in self._tops.items()}
        if self.vary == "together":
            if len(choices["heads"]) != len(choices["mlp"]):
                raise SubnetError(
                    f"heads = {choices['heads']} and mlp = {choices['mlp']} vary together but are not of one length: "
                    "give as many choices for one as for the other, or vary='independent'."
                )
            largest_first = (sorted(choices[axis], reverse=True) for axis in ("heads", "mlp"))
            pairs = sorted(set(zip(*largest_first, strict=True)), reverse=True)
            choices["heads"], choices["mlp"] = zip(*pairs, strict=True)
        else:
            choices |= {axis: tuple(sorted(set(choices[axis]), reverse=True)) for axis in ("heads", "mlp")}
        choices |= {axis: tuple(sorted(set(choices[axis]), reverse=True)) for axis in ("embed", "depth")}
        for axis, top in self._tops.items():
            if max(choices[axis]) != top or min(choices[axis]) < 1:
                raise SubnetError(
                    f"{axis} = {choices[axis]}: expected sizes from 1 to {top}, with {top} (the supernet's own) among "
                    "them."
                )
            object.__setattr__(self, axis, choices[axis])
        if any(heads % kv_group(self.config) for heads in self.heads):
            raise SubnetError(
                f"heads = {self.heads}: expected multiples of {kv_group(self.config)}, the query heads that share a "
                "key-value head."
            )
        if self.layer_order is not None:
            object.__setattr__(self, "layer_order", tuple(map(int, self.layer_order)))
            if sorted(self.layer_order) != list(range(self.config.layers)):
                raise SubnetError(
                    f"layer_order = {self.layer_order}: expected each of 0..{self.config.layers - 1} once."
                )

    @property
    def _tops(self) -> dict[str, int]:
        c = self.config
        return {"embed": c.embed, "heads": c.heads, "mlp": c.mlp, "depth": c.layers}

    @classmethod
    def from_ratios(cls, config: Config, *, embed=(1.0,), width=(1.0, 0.48, 0.22), depth=(1.0, 0.5), **kw):
        """Choices as shares of the supernet; ``width`` is for heads and mlp.

        Sizes round to whole units (heads: to whole key-value groups), at least 1; those above 128 to a multiple of
        16, which matrix units like.
        """

        def sizes(top: int, ratios, axis: str, group: int = 1) -> tuple[int, ...]:
            for ratio in ratios:
                if not 0 < ratio <= 1:
                    raise SubnetError(f"{axis} ratio {ratio}: expected a share of the supernet in (0, 1].")
            exact = [top * ratio for ratio in ratios if ratio < 1]
            units = [16 if x > 128 and group == 1 else group for x in exact]
            return (top, *(min(top, max(unit, round(x / unit) * unit)) for x, unit in zip(exact, units, strict=True)))

        return cls(
            config,
            embed=sizes(config.embed, embed, "embed"),
            heads=sizes(config.heads, width, "width", kv_group(config)),
            mlp=sizes(config.mlp, width, "width"),
            depth=sizes(config.layers, depth, "depth"),
            **kw,
        )

    def kept_layers(self, depth: int) -> tuple[int, ...]:
        """Which layers a subnet of this depth keeps."""
        L = self.config.layers
        if self.layer_order is not None:
            return tuple(sorted(self.layer_order[:depth]))
        return tuple(i * L // depth for i in range(depth))

    def uniform(self, *, embed: int, heads: int, mlp: int, depth: int) -> Subnet:
        """The subnet with the same widths in every kept layer."""
        return Subnet(embed, (heads,) * depth, (mlp,) * depth, self.kept_layers(depth))

    @property
    def maxnet(self) -> Subnet:
        return maxnet(self.config)

    @property
    def minnet(self) -> Subnet:
        return self.uniform(embed=self.embed[-1], heads=self.heads[-1], mlp=self.mlp[-1], depth=self.depth[-1])

    def at_full_depth(self) -> SubnetSpace:
        """The same widths, every layer kept: what stage 1 samples from."""
        return dataclasses.replace(self, depth=(self.config.layers,))

    def sample(self, key: int | Array | np.ndarray) -> Subnet:
        """A random subnet; the same seed or key (or its data, as numbers) gives the same subnet."""
        seed = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(as_key(key)))
        rng = np.random.default_rng(seed)
        pick = lambda choices: choices[rng.integers(len(choices))]  # noqa: E731
        embed, depth = pick(self.embed), pick(self.depth)
        if self.vary == "per-layer":
            heads, mlp = (tuple(pick(choices) for _ in range(depth)) for choices in (self.heads, self.mlp))
            return Subnet(embed, heads, mlp, self.kept_layers(depth))
        heads, mlp = pick(self._widths())
        return self.uniform(embed=embed, heads=heads, mlp=mlp, depth=depth)

    def _widths(self) -> list[tuple[int, int]]:
        if self.vary == "together":
            return list(zip(self.heads, self.mlp, strict=True))
        return list(itertools.product(self.heads, self.mlp))

    def subnets(self) -> Iterator[Subnet]:
        """Every uniform subnet (per-layer mixtures are too many to list)."""
        for embed, (heads, mlp), depth in itertools.product(self.embed, self._widths(), self.depth):
            yield self.uniform(embed=embed, heads=heads, mlp=mlp, depth=depth)

    def check(self, subnet: Subnet) -> Subnet:
        """The subnet itself, if the space contains it.

        Raises:
            SubnetError: it does not; the message says along which axis, and what the choices are.
        """
        check_fits(self.config, subnet)
        for axis, values in (("embed", (subnet.embed,)), ("heads", subnet.heads), ("mlp", subnet.mlp)):
            if not set(values) <= set(getattr(self, axis)):
                raise SubnetError(f"{axis} = {values} is not in this space: choose from {getattr(self, axis)}.")
        if subnet.depth not in self.depth or subnet.layers != self.kept_layers(subnet.depth):
            raise SubnetError(
                f"layers {subnet.layers} are not in this space: choose a depth from {self.depth}, which keeps "
                + "; ".join(f"{d}: {self.kept_layers(d)}" for d in self.depth)
                + "."
            )
        if self.vary != "per-layer" and set(zip(subnet.heads, subnet.mlp, strict=True)) - set(self._widths()):
            raise SubnetError(f"{subnet}: heads and mlp vary together here: choose from {self._widths()}.")
        if self.vary != "per-layer" and len({*subnet.heads}) + len({*subnet.mlp}) > 2:
            raise SubnetError(f"{subnet}: widths differ between layers, which needs vary='per-layer'.")
        return subnet

    def fraction(self, share: float) -> Subnet:
        """The uniform subnet with the most non-embedding parameters not above ``share`` of the maxnet's.

        Among equals (within 2 % of the maxnet), the one that keeps more depth, then more channels.

        Raises:
            SubnetError: no subnet has between 3/4 of that share and all of it.
        """
        whole = num_params(self.config)
        sizes = [(num_params(self.config, subnet) / whole, subnet) for subnet in self.subnets()]
        fitting = [(size, subnet) for size, subnet in sizes if 0.75 * share <= size <= share]
        if not fitting:
            raise SubnetError(
                f"no subnet has {0.75 * share:.3f} to {share:.3f} of the maxnet's parameters; this space has "
                f"{', '.join(f'{size:.3f}' for size in sorted({size for size, _ in sizes}))}."
            )
        largest = max(size for size, _ in fitting)
        near = [(subnet.depth, subnet.embed, size, subnet) for size, subnet in fitting if size >= largest - 0.02]
        return max(near, key=lambda row: row[:3])[-1]

    def names(self) -> dict[str, Subnet]:
        """The named palette, largest first: maxnet, the fractions that exist in this space, minnet."""
        named = {"minnet": self.minnet, "maxnet": self.maxnet}
        for name, share in sorted(FRACTIONS.items(), key=lambda item: item[1]):
            try:
                subnet = self.fraction(share)
            except SubnetError:
                continue
            if subnet not in named.values():
                named[name] = subnet
        return dict(sorted(named.items(), key=lambda item: -num_params(self.config, item[1])))

    def named(self, name: str) -> Subnet:
        """A subnet by its name, or by sizes: ``"embed=384,heads=6,mlp=736,depth=3"`` (what is left out stays whole).

        Raises:
            UnknownNameError: no such name. SubnetError: sizes that the space does not contain.
        """
        if "=" in name:
            sizes, given = dict(self._tops), set()
            for part in name.split(","):
                axis, _, value = part.strip().partition("=")
                if axis in given:
                    raise SubnetError(f"{name!r}: {axis} is there twice.")
                given.add(axis)
                if axis not in sizes:
                    raise unknown("axis", axis, sizes)
                if not (value.isascii() and value.isdigit()):
                    raise SubnetError(f"{part!r}: expected a whole number after {axis}=.")
                sizes[axis] = int(value)
            if sizes["depth"] not in self.depth:
                raise SubnetError(f"depth = {sizes['depth']} is not in this space: choose from {self.depth}.")
            return self.check(self.uniform(**sizes))
        if name in FRACTIONS:
            return self.fraction(FRACTIONS[name])
        whole = {"maxnet": self.maxnet, "minnet": self.minnet}
        if name not in whole:
            raise unknown("subnet", name, [*whole, *FRACTIONS])
        return whole[name]


@lru_cache(maxsize=64)
def uniform_subnets(space: SubnetSpace) -> frozenset[Subnet]:
    """What :meth:`SubnetSpace.subnets` lists."""
    return frozenset(space.subnets())
