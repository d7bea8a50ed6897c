"""Which axis of the mesh splits which named axis of the arrays: one table for every tree there is.

A mesh has up to three axes: ``data`` (each group of devices sees other examples and holds all weights), ``fsdp`` (other
examples, and the weights are split: ZeRO-3) and ``tensor`` (the same examples, heads and neurons are split: Megatron,
arXiv 1909.08053). The names of the arrays' axes do the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlfs_jax.backbone.cache import Cache
from mlfs_jax.backbone.quantised import Quantised
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.data.batches import Batches
from mlfs_jax.errors import ConfigError, unknown
from mlfs_jax.hosts import several
from mlfs_jax.lora import Lora, lora_axes

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "embedding": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Name of an array's axis -> axis of the mesh. What is not here is not split: layers, head_dim, rank, positions."""


def mesh_sizes(spec: str) -> dict[str, int]:
    """Axis of the mesh -> its size, from ``"data=2,fsdp=4,tensor=1"``; what is left out is 1.

    Raises:
        ConfigError: no such axis, or no whole number.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ConfigError(f"mesh {spec!r}: {name} = {size!r}; expected a whole number of at least 1.")
        sizes[name] = int(size)
    return sizes


def make_mesh(spec: str, devices: list | None = None) -> Mesh:
    """A mesh from ``"data=2,fsdp=4,tensor=1"``; what is left out is 1.

    Raises:
        ConfigError: no such axis, no whole number, or another number of devices than there are.
    """
    sizes = mesh_sizes(spec)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {spec!r} has {math.prod(sizes.values())} places for {len(devices)} devices: their product must be "
            "the number of devices."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=devices)


def mesh_of_job(mesh: Mesh | None) -> Mesh | None:
    """The mesh that was asked for; where there is none and there are several processes, all weights on each device."""
    return make_mesh(f"data={jax.device_count()}") if mesh is None and several() else mesh


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with Auto axes: the compiler splits what is between arguments and results.

    A mesh with Explicit axes is taken wherever one is asked for, and used so. The networks say nowhere how their
    intermediate values are split, which Explicit axes ask for at the first gather and wherever a split axis is summed.
    To call one on arrays that lie on an Explicit mesh, wrap the call in ``jax.sharding.auto_axes``.
    """
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return mesh if mesh.axis_types == kinds else Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def spec_of(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """How an array with these named axes is split.

    An axis that the mesh's does not divide stays whole (three key-value heads on two devices); of two that would go to
    one axis of the mesh, the first is split.
    """
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES.get(axis, ())
        names = tuple(n for n in ((rule,) if isinstance(rule, str) else rule) if mesh.shape[n] > 1 and n not in used)
        fits = bool(names) and size % math.prod(mesh.shape[n] for n in names) == 0
        used |= set(names) if fits else set()
        entries.append(names if fits else None)
    return PartitionSpec(*entries)


def sharding_of(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The same as a sharding, on the mesh with :func:`automatic` axes."""
    return NamedSharding(automatic(mesh), spec_of(mesh, axes, shape))


def base_shardings(mesh: Mesh, base: nnx.State) -> nnx.State:
    """The sharding of every weight, in a tree of the base's structure (an abstract base will do)."""
    return map_named(lambda name, leaf: sharding_of(mesh, leaf.axes, leaf.shape), base)


def shard_base(mesh: Mesh, base: nnx.State) -> nnx.State:
    """The base with every weight in its place; raises ConfigError for a quantised one."""
    if any(isinstance(leaf.get_value(), Quantised) for leaf in flatten(base).values()):
        raise ConfigError("a quantised base lies on one device: leave the mesh out, or the quantisation.")
    places = {name: leaf.get_value() for name, leaf in flatten(base_shardings(mesh, base)).items()}
    return map_named(lambda name, leaf: put(leaf[...], places[name]), base)


def shard_lora(base: nnx.State, lora: Lora) -> Lora:
    """An adapter in its place beside the base's weights; unchanged where the base lies on no mesh."""
    mesh = mesh_of(base)
    if mesh is None:
        return lora
    axes = lora_axes(base, lora)
    place = lambda names, x: put(x, sharding_of(mesh, names, x.shape))  # noqa: E731
    return {site: {leaf: place(axes[site][leaf], x) for leaf, x in entry.items()} for site, entry in lora.items()}


def shard_cache(base: nnx.State, cache: Cache) -> Cache:
    """A key-value cache in its place beside the base's weights; unchanged where the base lies on no mesh."""
    mesh = mesh_of(base)
    return cache if mesh is None else put(cache, jax.tree.map(partial(_cache_place, mesh), cache))


def _cache_place(mesh: Mesh, x: jax.Array) -> NamedSharding:
    axes = ("layers", "batch", "", "kv_heads", "head_dim") if x.ndim == 5 else ("batch", *[""] * (x.ndim - 1))
    return sharding_of(mesh, axes, x.shape)


def mesh_of(base: nnx.State) -> Any:
    """The :class:`jax.sharding.Mesh` on which a base lies; None where it is on one device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(base))
    return next((place.mesh for place in places if isinstance(place, NamedSharding)), None)


def state_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, params: Any, axes: Any) -> tuple[Any, Any]:
    """Where the trained tree and its optimizer's state go: moments beside their parameters, counters everywhere.

    Args:
        params: the trained tree, or its shapes.
        axes: names of its leaves' axes, in a tree of the same structure.
    """
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    leaves, structure = jax.tree.leaves(params), jax.tree.structure(params)
    at = [sharding_of(mesh, a, x.shape) for a, x in zip(names, leaves, strict=True)]
    places = jax.tree.unflatten(structure, at)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, params),
        places,
        transform_non_params=lambda _: replicated(mesh),
    )
    return places, moments


def rows_on(mesh: Mesh) -> NamedSharding:
    """Where activations lie: examples spread over ``data`` and ``fsdp`` as those of the batch, else whole."""
    return NamedSharding(automatic(mesh), PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raise ConfigError when the examples of a batch do not divide among the devices."""
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % places:
        raise ConfigError(f"batch_size = {rows} on a mesh of {places} (data times fsdp): expected a multiple of it.")


def shard_batch(mesh: Mesh, batch: Mapping) -> dict:
    """A batch with its rows spread over ``data`` and ``fsdp``.

    Raises:
        ConfigError: the rows do not divide among the devices.
    """
    check_rows(mesh, len(next(iter(batch.values()))))
    return _place_batch(mesh, batch)


def beside(base: nnx.State, batch: Mapping) -> Mapping:
    """A batch spread over the mesh on which a base lies, as far as its rows divide; unchanged where there is none."""
    mesh = mesh_of(base)
    return batch if mesh is None else _place_batch(mesh, batch)


def feed(mesh: Mesh, batches: Batches, step: int) -> dict[str, jax.Array]:
    """The batch of a step, as :func:`shard_batch` spreads it; each process makes the rows of its own devices only."""
    size = batches.batch_size
    check_rows(mesh, size)
    places = sharding_of(mesh, ("batch",), (size,)).addressable_devices_indices_map((size,)).values()
    mine = np.unique(np.concatenate([np.arange(size)[place] for place in places]))

    def whole(x: np.ndarray) -> jax.Array:
        shape = (size, *x.shape[1:])
        place = sharding_of(mesh, ("batch", *[""] * (x.ndim - 1)), shape)
        return jax.make_array_from_process_local_data(place, x, shape)

    return {name: whole(x) for name, x in batches.part(step, mine).items()}


def _place_batch(mesh: Mesh, batch: Mapping) -> dict[str, jax.Array]:
    place = lambda x: sharding_of(mesh, ("batch", *[""] * (x.ndim - 1)), x.shape)  # noqa: E731
    return {name: put(x, place(x)) for name, x in batch.items()}


def put(tree: Any, places: Any) -> Any:
    """Arrays that every process has, in their places: ``jax.device_put`` without its comparing them.

    Args:
        places: of the leaves, in a tree of the same structure; or one sharding or device for all.
    """

    def move(x: Any, place: Any) -> jax.Array:
        here = getattr(place, "is_fully_addressable", True)
        if here or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, place)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, x.__getitem__)

    one = isinstance(places, jax.sharding.Sharding | jax.Device)
    return jax.tree.map(lambda x: move(x, places), tree) if one else jax.tree.map(move, tree, places)
