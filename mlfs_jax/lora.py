"""Low-rank adapters as an argument of ``forward``, one pair per site and stage.

An adapter is a plain tree ``{site: {"a": [L, *in, R], "b": [L, R, *out]}}`` (no L at a site outside the stack), and

    W = W0 + sum_s A_s B_s                                   MLFS (arXiv 2404.01353), section 3

with scale 1. A part that is small and new, such as a classification head, is trained whole: its entry holds a *full
delta* per weight, ``{"head.out": {"kernel": ..., "bias": ...}}``, added to the frozen base. So whatever a stage
trains is one tree, and the base never changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy as safetensors
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError

from mlfs_jax.backbone.tree import STACKED, flatten, map_named, misfit, split_axes
from mlfs_jax.errors import ConfigError, RunError, unknown
from mlfs_jax.hosts import by_writer, to_host
from mlfs_jax.model import Model, as_key
from mlfs_jax.run import write_atomic

Lora = dict[str, dict[str, Array]]


def lora_sites(model: Model) -> tuple[str, ...]:
    """Sites that can take a low-rank pair: every linear map of the stacked layers."""
    names = (name.removesuffix(".kernel") for name in flatten(model.base) if name.endswith(".kernel"))
    return tuple(site for site in names if site.startswith(STACKED + "."))


def init_lora(
    key: int | Array, model: Model, *, rank: int = 8, sites: Sequence[str] | None = None, full: Sequence[str] = ()
) -> Lora:
    """A fresh adapter: A ~ N(0, 1/in), B = 0, so that it changes nothing yet.

    Args:
        key: or a seed.
        rank: R; the paper uses 8.
        sites: names as in :func:`lora_sites` (the default: all of them).
        full: prefixes of weights to train whole, by a zero delta; ``("head",)`` for a new head.

    Raises:
        UnknownNameError: a site or prefix that the model does not have.
        ConfigError: a rank below 1, or a language model's head, which stays as it is: the losses read it in the base.
    """
    key = as_key(key)
    for name, value in (("sites", sites), ("full", full)):
        if isinstance(value, str):  # its letters would be the names
            raise ConfigError(f"{name} = {value!r}: expected several names, such as ({value!r},).")
    if not isinstance(rank, int | np.integer) or rank < 1:
        raise ConfigError(f"rank = {rank}: expected a whole number of at least 1.")
    headed = [name for name in (*(sites or ()), *full) if name.split(".")[0] == "head"]
    if headed and model.config.head == "lm":
        raise ConfigError(f"{', '.join(headed)}: the head of a language model is frozen; leave it out.")
    weights = flatten(model.base)
    lora: Lora = {}
    for i, site in enumerate(lora_sites(model) if sites is None else sites):
        kernel = weights.get(f"{site}.kernel")
        if kernel is None:
            raise unknown("LoRA site", site, lora_sites(model))
        stacked, out = split_axes(kernel)
        shape = kernel.shape
        scale = math.prod(shape[stacked:out]) ** -0.5
        lora[site] = {
            "a": scale * jax.random.normal(jax.random.fold_in(key, i), (*shape[:out], rank)),
            "b": jnp.zeros((*shape[:stacked], rank, *shape[out:])),
        }
    for prefix in full:
        matching = [name for name in weights if name.startswith(prefix + ".")]
        if not matching:
            raise unknown("part to train whole", prefix, {name.rsplit(".", 1)[0] for name in weights})
        for name in matching:
            site, leaf = name.rsplit(".", 1)
            lora.setdefault(site, {})[leaf] = jnp.zeros(weights[name].shape)
    return lora


def lora_axes(base: nnx.State, lora: Mapping) -> dict[str, dict[str, tuple[str, ...]]]:
    """Axis names of every leaf of an adapter, derived from those of the base; the rank's axis is ``rank``."""
    weights, axes = flatten(base), {}
    for site, entry in lora.items():
        axes[site] = {leaf: weights[f"{site}.{leaf}"].axes for leaf in entry if leaf not in ("a", "b")}
        if "a" in entry:
            kernel = weights[f"{site}.kernel"]
            stacked, out = split_axes(kernel)
            axes[site]["a"] = (*kernel.axes[:out], "rank")
            axes[site]["b"] = (*kernel.axes[:stacked], "rank", *kernel.axes[out:])
    return axes


def stack_stages(stages: Sequence[Lora]) -> Lora:
    """One adapter equal to the sum of several: pairs side by side along the rank, deltas added."""
    merged: Lora = {}
    for lora in stages:
        for site, entry in lora.items():
            into = merged.setdefault(site, {})
            for leaf, value in entry.items():
                if leaf not in into:
                    into[leaf] = value
                elif leaf in ("a", "b"):
                    axis = -1 if leaf == "a" else int(site.startswith(STACKED + "."))
                    into[leaf] = jnp.concatenate([into[leaf], value], axis)
                else:
                    into[leaf] = into[leaf] + value
    return merged


def save_lora(file: str | Path, lora: Mapping) -> None:
    """Write an adapter to one safetensors file, atomically; names are ``site/leaf``. Of several processes all call."""
    flat = {f"{site}/{leaf}": to_host(value) for site, entry in lora.items() for leaf, value in entry.items()}
    by_writer(lambda: write_atomic(Path(file), safetensors.save(flat)))


def load_lora(file: str | Path) -> Lora:
    """Read what :func:`save_lora` wrote; raises RunError for a file that is missing or damaged."""
    lora: Lora = {}
    try:
        for name, value in safetensors.load_file(file).items():
            site, leaf = name.split("/")
            lora.setdefault(site, {})[leaf] = jnp.asarray(value)
    except (OSError, ValueError, SafetensorError) as e:
        raise RunError(f"{file} is missing or damaged ({e}): restore it, or fit again into another folder.") from e
    return lora


def _update(base: nnx.State, lora: Mapping, sign: int) -> nnx.State:
    if (wrong := misfit(base, lora)) is not None:
        raise ConfigError(f"this adapter is of another model: {wrong}.")

    def merged(name: str, leaf: nnx.Param) -> Array:
        site, kind = name.rsplit(".", 1)
        value, entry = leaf[...], lora.get(site, {})
        if kind == "kernel" and "a" in entry:
            stacked = leaf.axes[0] == STACKED
            product = lambda a, b: jnp.tensordot(a, b, axes=1)  # noqa: E731
            value = value + sign * (jax.vmap(product) if stacked else product)(entry["a"], entry["b"])
        value = value + sign * entry[kind] if kind in entry else value
        return value.astype(leaf[...].dtype)  # rounded once: a float32 adapter on a bfloat16 base

    return map_named(merged, base)


def merge_lora(base: nnx.State, lora: Mapping) -> nnx.State:
    """W0 + A B for every site, as a base of the same structure and type; ConfigError where the base lacks one."""
    return _update(base, lora, +1)


def unmerge_lora(base: nnx.State, lora: Mapping) -> nnx.State:
    """The inverse of :func:`merge_lora`, up to rounding."""
    return _update(base, lora, -1)
