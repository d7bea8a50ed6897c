"""The key-value cache of a decoder: one stacked pytree, written by ``forward`` and donated from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from mlfs_jax.config import DecoderConfig


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "valid", "length"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that each row has seen, in S slots a row.

    Attributes:
        k: [L, B, S, K, H], rotated already.
        v: [L, B, S, K, H] (value channels, for latent attention).
        valid: [B, S], whether a slot holds a real token; padding takes a slot, too.
        length: [B], the next free slot. Positions count the valid slots before, so padding shifts none.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    valid: Bool[Array, "B S"]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype=jnp.float32) -> Cache:
    """An empty cache of ``capacity`` slots for each of ``batch`` rows."""
    heads, value = config.kv_heads, config.head_dim
    if config.latent is not None:  # kept expanded: every head has its own keys
        heads, value = config.heads, config.latent.value
    shape = (config.layers, batch, capacity, heads)
    return Cache(
        k=jnp.zeros((*shape, config.head_dim), dtype),
        v=jnp.zeros((*shape, value), dtype),
        valid=jnp.zeros((batch, capacity), bool),
        length=jnp.zeros((batch,), jnp.int32),
    )


def write(slots: Array, new: Shaped[Array, "B T ..."], at: Int[Array, " B"], *layer: Int[Array, ""]) -> Array:
    """``slots`` [B, S, ...], or of one ``layer`` [L, B, S, ...], with ``new`` at slots at[b] .. at[b] + T - 1 of row b.

    It is a scatter, which a loop over layers that carries all of them does in place. What does not fit is dropped: that
    it fits is the caller's to see to.
    """
    rows, columns = jnp.arange(new.shape[0])[:, None], at[:, None] + jnp.arange(new.shape[1])
    new = new.astype(slots.dtype)
    return slots.at[*layer, rows, columns].set(new, indices_are_sorted=True, unique_indices=True, mode="drop")
