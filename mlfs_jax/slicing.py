"""From a mask to a smaller network: cutting trees along their named axes.

A slice is a prefix of every elastic axis (reorder by importance first, see :mod:`mlfs_jax.importance`) and a choice of
layers. Masked and sliced logits agree to rounding; the tests hold that for random subnets of every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from mlfs_jax.backbone.tree import STACKED, Mask, map_named
from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.errors import SubnetError
from mlfs_jax.lora import Lora, lora_axes, merge_lora
from mlfs_jax.model import Model, abstract
from mlfs_jax.subnet import Subnet, check_fits, kept_widths


def _cut(config: Config, x: Array, axes: tuple[str, ...], subnet: Subnet) -> Array:
    """One array, physically smaller; widths that differ between layers are zeroed up to the widest layer's."""
    widths = kept_widths(config, subnet.embed, max(subnet.heads), max(subnet.mlp))
    if axes and axes[0] == STACKED and subnet.layers != tuple(range(x.shape[0])):
        x = x[np.asarray(subnet.layers)]
    x = x[tuple(slice(widths.get(axis)) for axis in axes)]
    for axis, counts in (("heads", subnet.heads), ("mlp", subnet.mlp)):
        if axis in axes and len(set(counts)) > 1:
            keep = np.arange(widths[axis]) < np.asarray(counts)[:, None]  # [l, width]
            where = [len(subnet.layers) if i == 0 else widths[axis] if a == axis else 1 for i, a in enumerate(axes)]
            x = x * jnp.asarray(keep.reshape(where), x.dtype)
    return x


def slice_base(config: Config, base: nnx.State, subnet: Subnet) -> nnx.State:
    """The weights of a subnet, of the same structure as the supernet's."""
    return map_named(lambda name, leaf: _cut(config, leaf[...], leaf.axes, subnet), base)


def slice_lora(config: Config, base: nnx.State, lora: Mapping, subnet: Subnet) -> Lora:
    """The adapter of a subnet: P_c keeps rows of A and columns of B; the rank is not sliced (MLFS, section 3)."""
    axes = lora_axes(base, lora)
    return {
        site: {leaf: _cut(config, value, axes[site][leaf], subnet) for leaf, value in entry.items()}
        for site, entry in lora.items()
    }


def slice_config(config: Config, subnet: Subnet) -> Config:
    """The shape of the sliced network: scalar widths, the widest layer's where layers differ."""
    check_fits(config, subnet)
    if getattr(config, "qk_norm", "none") == "full" and len({*subnet.heads}) > 1:
        raise SubnetError(
            f"heads = {subnet.heads}: queries are normed over all heads together here, so a sliced model needs the "
            "same number in every layer."
        )
    sizes: dict[str, Any] = kept_widths(config, subnet.embed, max(subnet.heads), max(subnet.mlp))
    if isinstance(config, DecoderConfig) and config.windows:
        sizes["windows"] = tuple(config.windows[i] for i in subnet.layers)
    return config.replace(**sizes, layers=subnet.depth)


def slice_mask(mask: Mask, subnet: Subnet) -> Mask:
    """A mask over the supernet as a mask over the network sliced to ``subnet`` (all of whose layers are kept)."""
    return Mask(
        mask.embed[: subnet.embed], mask.heads[:, : max(subnet.heads)], mask.mlp[:, : max(subnet.mlp)], mask.layers
    )


def slice_subnet(model: Model, subnet: Subnet, *, lora: Mapping | None = None) -> Model:
    """A physically smaller model of the same kind, with ``lora`` merged in.

    Its logits equal ``forward(..., lora=lora, mask=make_mask(model.config, subnet))`` to rounding.

    Raises:
        SubnetError: the subnet is larger than the model.
    """
    config = slice_config(model.config, subnet)
    base = _merge_and_slice(model.config, model.base, lora, subnet)
    return model.replace(config=config, graphdef=abstract(config)[0], base=base)


@partial(jax.jit, static_argnames=("config", "subnet"))
def _merge_and_slice(config: Config, base: nnx.State, lora: Mapping | None, subnet: Subnet) -> nnx.State:
    return slice_base(config, base if lora is None else merge_lora(base, lora), subnet)
