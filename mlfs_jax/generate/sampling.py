"""How to generate, and the rule that makes a token of logits; which network made them does not matter here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlfs_jax.errors import ConfigError


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p"], meta_fields=[])
@dataclass(frozen=True)
class Sampling:
    """The numbers of random sampling: arrays, so that another value is no new compile."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


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
        stop_tokens: ids that end a text; None: the model's own (``config.eos_token_ids``).

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
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} = {value!r}: expected a whole number of at least {least}.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature = {self.temperature}: expected 0 (no sampling) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: expected a probability above 0, up to 1 (all tokens).")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty = {self.length_penalty}: expected a finite number.")
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
    V = logits.shape[-1]

    def restrict(logits):
        ordered = jnp.sort(logits, axis=-1, descending=True)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
        kth = jnp.take_along_axis(ordered, jnp.full((len(logits), 1), k - 1), -1)
        p = jax.nn.softmax(jnp.where(ordered < kth, -jnp.inf, ordered))
        likelier = jnp.cumsum(p, -1) - p  # probability of all the tokens before it
        nucleus = (likelier < sampling.top_p) | (sampling.top_p >= 1)
        last = jnp.maximum(kth, jnp.where(nucleus, ordered, jnp.inf).min(-1, keepdims=True))
        return jnp.where(logits < last, -jnp.inf, logits)

    # sorting a vocabulary costs more than all the rest
    return jax.lax.cond((sampling.top_k > 0) | (sampling.top_p < 1), restrict, lambda logits: logits, logits)


def pick(logits: Float[Array, "B V"], sampling: Sampling | None, key: Array) -> Int[Array, " B"]:
    """One token for each row: the most likely one, or drawn at random from :func:`warp`'s distribution.

    Every row draws from a key of its own, so what a row gets does not depend on how many rows there are.
    """
    if sampling is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, warp(logits, sampling)).astype(jnp.int32)
