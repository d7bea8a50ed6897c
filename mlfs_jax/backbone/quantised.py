"""Frozen kernels in 8 or 4 bits, with float adapters beside them (QLoRA, arXiv 2305.14314).

A :class:`Quantised` stands in a base where a kernel's array stood. ``param[...]`` gives the weights, in float, so what
only reads a base needs to know nothing of it; a forward pass makes one layer's weights at a time and forgets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mlfs_jax.backbone.tree import STACKED, flatten, map_named
from mlfs_jax.errors import ConfigError

GROUP = 64
"""Inputs that share a scale; a few less where they do not divide so."""


def _normal_float() -> Float[np.ndarray, " 16"]:
    """The levels of NF4: quantiles of a normal distribution, 7 below and 8 above an exact 0, in [-1, 1] (QLoRA,
    section 3; where the quantiles begin is from its released code)."""
    above, below = (
        [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count, endpoint=False)] for count in (8, 7)
    )
    return (np.sort([*above, 0.0, *(-x for x in below)]) / above[0]).astype(np.float32)


NF4 = _normal_float()


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dims", "dtype"])
@dataclass(frozen=True)
class Quantised:
    """A kernel [*stack, *in, *out] as whole numbers and a scale for every group of inputs.

    Attributes:
        codes: int8 [*stack, in, out], or of 4 bits uint8 [*stack, in / 2, out]: the second half of the inputs above
            the first. Axes of inputs, and those of outputs, are one here; inputs are filled up to whole groups.
        scale: of each group, the largest weight.
        dims: shape of the kernel without its stack.
        dtype: of the weights that come out.
    """

    codes: Int[Array, "*stack rows out"]
    scale: Float[Array, "*stack groups out"]
    dims: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], *self.dims)

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == jnp.uint8 else 8

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: DTypeLike) -> Quantised:
        """The same, coming out in another type."""
        return replace(self, dtype=np.dtype(dtype))

    def __getitem__(self, index: EllipsisType) -> Float[Array, "*shape"]:
        """The weights; ``[...]`` is the only index, as of an ``nnx.Param``."""
        if index is not ...:
            raise TypeError(f"a quantised kernel has no [{index!r}]: expected [...], then index the weights.")
        if self.bits == 4:
            levels = jnp.asarray(NF4)[jnp.concatenate([self.codes & 15, self.codes >> 4], -2)]
        else:
            levels = self.codes.astype(jnp.float32) / 127
        *stack, groups, out = self.scale.shape
        grouped = levels.reshape(*stack, groups, -1, out) * self.scale[..., None, :]
        rows = math.prod(self.dims) // out
        return grouped.reshape(*stack, -1, out)[..., :rows, :].reshape(self.shape).astype(self.dtype)

    def contract(self, x: Float[Array, "... in"], axes: int) -> Float[Array, "... out"]:
        """``tensordot(x, weights, axes)``; for the gradient the weights are made again, not kept."""
        return jax.checkpoint(lambda x, kernel: jnp.tensordot(x, kernel[...], axes=axes))(x, self)


def check_bits(bits: int) -> None:
    """Raises ConfigError for a number of bits that :func:`quantise` does not know."""
    if bits not in (4, 8, 32):
        raise ConfigError(f"base_bits = {bits}: expected 4, 8 or 32 (as it is).")


def quantise(base: nnx.State, bits: int) -> nnx.State:
    """The base with the kernels of its layers in 8 bits, symmetrically, or in 4 (NF4), one scale for 64 inputs.

    Embeddings, norms, biases and the head stay as they are. Of QLoRA, the scales are not quantised in turn. What merges
    adapters into the base makes it a float one again.

    Args:
        bits: 8, 4, or 32: as they are. A base that is quantised already is given back with its own bits only.

    Raises:
        ConfigError: another number of bits, or a base that lies on a mesh.
    """
    check_bits(bits)
    values = (leaf.get_value() for leaf in flatten(base).values())
    has = {value.bits for value in values if isinstance(value, Quantised)}
    if has - {bits}:
        raise ConfigError(f"base_bits = {bits}: this base is in {has.pop()} bits already; give those, or load it anew.")
    if bits == 32 or has:
        return base

    return map_named(lambda name, leaf: quantise_weight(name, leaf, leaf.get_value(), bits), base)


def quantise_weight(name: str, spec: nnx.Param, value: Array, bits: int) -> Array | Quantised:
    """One weight of :func:`quantise`, as it is where that leaves it so; ``spec`` says which of its axes are inputs."""
    if bits == 32 or not (name.startswith(f"{STACKED}.") and name.endswith(".kernel")):
        return value
    if isinstance(getattr(value, "sharding", None), NamedSharding):
        raise ConfigError(f"base_bits = {bits}: a base on a mesh is not quantised here; leave one of the two out.")
    return _encode(value, spec.inputs, bits)


def dequantised(base: nnx.State) -> nnx.State:
    """The base with all its kernels as float arrays."""
    return map_named(lambda _, leaf: leaf[...], base)


@partial(jax.jit, static_argnames=("inputs", "bits"))
def _encode(kernels: Array, inputs: int, bits: int) -> Quantised:
    dims = kernels.shape[1:]
    rows = math.prod(dims[:inputs])
    groups = -(-rows // GROUP)
    size = -(-rows // groups)
    size += size % 2  # 4 bits: two halves

    def one(kernel: Array) -> Quantised:
        flat = kernel.astype(jnp.float32).reshape(rows, -1)
        flat = jnp.pad(flat, ((0, groups * size - rows), (0, 0)))  # whole groups
        grouped = flat.reshape(groups, size, -1)
        scale = jnp.maximum(jnp.abs(grouped).max(1), 1e-12)
        levels = (grouped / scale[:, None]).reshape(flat.shape)
        if bits == 8:
            return Quantised(jnp.round(127 * levels).astype(jnp.int8), scale, dims, kernel.dtype)
        nearest = jnp.searchsorted(jnp.asarray((NF4[1:] + NF4[:-1]) / 2), levels).astype(jnp.uint8)
        low, high = jnp.split(nearest, 2)
        return Quantised(low | high << 4, scale, dims, kernel.dtype)

    return jax.lax.map(one, kernels)  # what it takes to encode is kept for one layer at a time
