"""The programs that run a decoder with a cache: compiled once for every batch and length bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.cache import Cache
from mlfs_jax.backbone.tree import Mask, flatten
from mlfs_jax.errors import ConfigError
from mlfs_jax.generate.beams import beam_search
from mlfs_jax.generate.loop import Rows, Step, advance, decode
from mlfs_jax.generate.sampling import Sampling
from mlfs_jax.model import Model, forward
from mlfs_jax.subnet import Subnet, make_mask


@dataclass(frozen=True)
class Network:
    """One function of tokens: the shared weights, and what makes them one subnet with one adapter.

    Raises:
        ConfigError: the model is no language model. SubnetError: the subnet does not fit it.
    """

    model: Model
    lora: Mapping[str, dict] | None = None
    subnet: Subnet | Mask | None = None
    mask: Mask | None = field(init=False, repr=False)

    def __post_init__(self):
        config = self.model.decoder
        if config.head != "lm":
            raise ConfigError(f"{self.model.name} has no head that makes tokens: load it with head='lm'.")
        mask = make_mask(config, self.subnet) if isinstance(self.subnet, Subnet) else self.subnet
        object.__setattr__(self, "mask", mask)

    @property
    def weights(self) -> tuple:
        """The leading arguments of the compiled functions below."""
        return self.model.graphdef, self.model.base, self.lora, self.mask

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values in the cache: what the embeddings have."""
        return flatten(self.model.base)["embed.tokens.table"].dtype

    def difference(self, other: Network) -> str | None:
        """What is not the same in another network, in words; None: nothing, they compute the same function."""
        parts = {
            "model": (self.model.base, other.model.base),
            "adapter": (self.lora, other.lora),
            "subnet": (self.mask, other.mask),
        }
        if self.model.graphdef != other.model.graphdef:
            return "model"
        return next((name for name, (ours, theirs) in parts.items() if not _same(ours, theirs)), None)

    def stop(self, tokens: tuple[int, ...] | None) -> Bool[np.ndarray, " V"]:
        """Which tokens end a text; None: the model's own."""
        config = self.model.decoder
        if tokens is None:  # a model without a row for its own end never writes it
            tokens = tuple(token for token in config.eos_token_ids if token < config.vocab_size)
        strange = [token for token in tokens if not 0 <= token < config.vocab_size]
        if strange:
            raise ConfigError(f"stop_tokens has {strange}: expected ids from 0 to {config.vocab_size - 1}.")
        return np.isin(np.arange(config.vocab_size), tokens)


def _same(a, b) -> bool:
    """Whether two trees hold the same arrays, or equal ones; equal ones are compared only where it must be."""
    structure: Callable[..., Any] = jax.tree.structure  # whose result no checker knows
    same = structure(a) == structure(b)
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    equal = lambda x, y: x is y or (x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y))  # noqa: E731
    return same and all(equal(x, y) for x, y in zip(a, b, strict=True))


def _step(graphdef: nnx.GraphDef, base: nnx.State, lora, mask: Mask | None) -> Step:
    """The step function of a network: its state is a cache."""

    def step(cache: Cache, tokens, alive):
        batch = {"input_ids": tokens[:, None], "attention_mask": alive[:, None]}
        out = forward(graphdef, base, batch, lora=lora, mask=mask, cache=cache)
        return out.logits[:, 0], out.cache

    return step


def reorder(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    """The cache whose row i is row ``rows[i]`` of this one."""
    return Cache(k=cache.k[:, rows], v=cache.v[:, rows], valid=cache.valid[rows], length=cache.length[rows])


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill(graphdef, base, lora, mask, cache: Cache, tokens: Int[Array, "B C"], real: Bool[Array, "B C"]) -> Cache:
    """Read tokens, without the head; the cache is given up."""
    batch = {"input_ids": tokens, "attention_mask": real}
    return forward(graphdef, base, batch, lora=lora, mask=mask, cache=cache, logits=False).cache


@partial(jax.jit, static_argnames=("graphdef", "room"), donate_argnames="cache")
def decode_rows(
    graphdef, base, lora, mask, cache: Cache, first, *, room: int, limit, stop, sampling: Sampling | None, key
) -> tuple[Rows, Int[Array, "B M"]]:
    """:func:`decode` with a network; the cache is given up, the new one is in the rows."""
    step = _step(graphdef, base, lora, mask)
    return decode(step, cache, first, room=room, limit=limit, stop=stop, sampling=sampling, key=key)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="rows")
def decode_token(
    graphdef, base, lora, mask, rows: Rows, *, stop, sampling: Sampling | None, key
) -> tuple[Rows, Int[Array, " B"]]:
    """One step of the same: for the one who wants each token when it is there."""
    return advance(_step(graphdef, base, lora, mask), rows, stop, sampling, key)


@partial(jax.jit, static_argnames=("graphdef", "beams", "room"))
def decode_beams(
    graphdef, base, lora, mask, cache: Cache, first, *, beams: int, room: int, limit, stop, length_penalty
) -> tuple[Int[Array, "B M"], Float[Array, " B"]]:
    """:func:`beam_search` with a network; the cache stays as it is."""
    return beam_search(
        _step(graphdef, base, lora, mask),
        cache,
        first,
        reorder=reorder,
        beams=beams,
        room=room,
        limit=limit,
        stop=stop,
        length_penalty=length_penalty,
    )
