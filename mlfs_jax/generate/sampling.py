"""How to generate, and the rule that makes a token of logits; which network made them does not matter here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.errors import ConfigError


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p"], meta_fields=[])
@dataclass(frozen=True)
class Sampling:
    """The numbers of random sampling: arrays, so that another value is no new compile."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


SMALLEST = 1e-30
"""What float32 still tells from 0, and can divide by."""


@dataclass(frozen=True)
class GenerateConfig:
    """How to continue a text. The default is greedy: always the most likely token.

    Attributes:
        max_new_tokens: tokens at most, a stop token included.
        beams: hypotheses of a beam search; 1: none.
        length_penalty: a hypothesis is worth its log-probability / length^penalty; above 0 favours long ones.
        temperature: of random sampling; 0: no sampling.
        top_k: sample from the k most likely tokens; 0: from all.
        top_p: sample from the fewest most likely tokens that have this probability together; 1: from all.
        stop_tokens: ids that end a text; None: the model's own.

    Raises:
        ConfigError: a value out of range, or one that would have no effect.
    """

    max_new_tokens: int = 64
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("beams", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise ConfigError(f"{name} = {value!r}: expected a whole number of at least {least}, below 2^31.")
        try:
            [operator.index(token) for token in (() if self.stop_tokens is None else self.stop_tokens)]
        except TypeError:
            expected = "expected ids, such as (2,), or None for the model's own."
            raise ConfigError(f"stop_tokens = {self.stop_tokens!r}: {expected}") from None
        if not (self.temperature == 0 or SMALLEST <= self.temperature < math.inf):
            raise ConfigError(f"temperature = {self.temperature}: expected 0 (no sampling), or {SMALLEST} or more.")
        if not SMALLEST <= self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: expected a probability from {SMALLEST} up to 1 (all tokens).")
        if not abs(self.length_penalty) <= 8:  # length^penalty and what is divided by it are float32
            raise ConfigError(f"length_penalty = {self.length_penalty}: expected a number from -8 to 8.")
        if self.beams > 1 and self.temperature:
            raise ConfigError(
                f"beams = {self.beams} with temperature = {self.temperature}: a beam search draws nothing at random; "
                "set one of them."
            )
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ConfigError(
                f"top_k = {self.top_k}, top_p = {self.top_p} with temperature = 0, which always takes the most likely "
                "token: set a temperature, 1.0 to sample from the model's own probabilities."
            )
        if self.beams == 1 and self.length_penalty != 1:
            raise ConfigError(f"length_penalty = {self.length_penalty} without a beam search: set beams, too.")

    @property
    def sampling(self) -> Sampling | None:
        """What :func:`pick` takes; None: greedy."""
        if not self.temperature:
            return None
        return Sampling(jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p))


GREEDY = GenerateConfig()


def warp(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits that are sampled from: over temperature; then tokens beyond top_k, then beyond top_p, at -inf.

    Top-p is nucleus sampling (arXiv 1904.09751). Tokens that are exactly as likely as the last one kept are kept.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature

    def restrict(logits):
        order = _as_integers(logits)
        k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
        kth = _smallest(lambda at: (order > at).sum(-1, keepdims=True) < k, len(logits))
        p = jax.nn.softmax(jnp.where(order < kth, -jnp.inf, logits))
        likelier = lambda at: jnp.where(order > at, p, 0).sum(-1, keepdims=True)  # noqa: E731
        last = _smallest(lambda at: (likelier(at) < sampling.top_p) | (sampling.top_p >= 1), len(logits))
        return jnp.where(order < jnp.maximum(kth, last), -jnp.inf, logits)

    return jax.lax.cond((sampling.top_k > 0) | (sampling.top_p < 1), restrict, lambda logits: logits, logits)


def _as_integers(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers in the same order as floats."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 is 0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _smallest(holds: Callable[[Int[Array, "B 1"]], Bool[Array, "B 1"]], rows: int) -> Int[Array, "B 1"]:
    """The smallest integer that something holds for, which holds for all above it, too: 32 halvings.

    A threshold among the logits of a vocabulary is found so in a tenth of the time of sorting them (measured on a CPU).
    """

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        ok = holds(middle)
        return jnp.where(ok, low, middle + 1), jnp.where(ok, middle, high)

    whole = jnp.iinfo(jnp.int32)
    ends = (jnp.full((rows, 1), end, jnp.int32) for end in (whole.min, whole.max))
    return jax.lax.fori_loop(0, 32, halve, tuple(ends))[0]


def pick(logits: Float[Array, "B V"], sampling: Sampling | None, key: Array) -> Int[Array, " B"]:
    """One token for each row: the most likely one, or drawn at random from :func:`warp`'s distribution.

    Every row draws from a key of its own, so what a row gets does not depend on how many rows there are.
    """
    if sampling is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, warp(logits, sampling)).astype(jnp.int32)
