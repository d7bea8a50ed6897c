"""Beam search as transformers has it (``num_beams``, ``length_penalty``, ``early_stopping=False``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.generate.loop import State, Step

NONE = -jnp.inf
"""The score of an ended hypothesis that is none."""
SHUT = -1e9
"""The sum of log-probabilities of an open one that is not to be continued."""


class Beams(NamedTuple):
    """K open and K ended hypotheses of each of B texts, best first; M columns of tokens, -1 where there is none."""

    state: State
    length: Int[Array, ""]
    open: Int[Array, "B K M"]
    open_scores: Float[Array, "B K"]  # sums of log-probabilities
    ended: Int[Array, "B K M"]
    ended_scores: Float[Array, "B K"]  # / length^penalty
    is_ended: Bool[Array, "B K"]
    improvable: Bool[Array, " B"]  # whether an open hypothesis may still become better than the worst ended one

    def last(self, first: Int[Array, " B"]) -> Int[Array, " BK"]:
        """The last token of every open hypothesis."""
        last = jax.lax.dynamic_index_in_dim(self.open, jnp.maximum(self.length - 1, 0), 2, keepdims=False)
        return jnp.where(self.length == 0, first[:, None], last).reshape(-1)


def beam_search(
    step: Step,
    state: State,
    first: Int[Array, " B"],
    *,
    reorder: Callable[[State, Int[Array, " rows"]], State],
    beams: int,
    room: int,
    limit: Int[Array, ""],
    stop: Bool[Array, " V"],
    length_penalty: Float[Array, ""],
) -> tuple[Int[Array, "B M"], Float[Array, " B"]]:
    """The best hypothesis of each text that K = ``beams`` open ones at a time lead to.

    A hypothesis ends with a stop token that is among the K best continuations, or at ``limit``. The search ends when
    no text's best open hypothesis, at its present length, is worth more than its K-th ended one. What is not named
    below is as in :func:`mlfs_jax.generate.decode`, of B rows.

    Args:
        reorder: ``reorder(state, rows)``: the state whose row i is the given state's row ``rows[i]``; a row may be
            taken more than once, or not at all.
        length_penalty: scores are sums of log-probabilities / length^penalty; a stop token counts.

    Returns tokens (stop token included, -1 behind) and scores.
    """
    B, K = len(first), beams
    offset = K * jnp.arange(B)[:, None]
    gather = lambda x, at: jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), 1)  # noqa: E731

    def unfinished(beams: Beams):
        return (beams.length < limit) & beams.improvable.any()

    def body(beams: Beams) -> Beams:
        logits, state = step(beams.state, beams.last(first), jnp.ones(B * K, bool))
        V = logits.shape[-1]
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(B, K, V) + beams.open_scores[..., None]
        length = beams.length + 1
        weight = length.astype(jnp.float32) ** length_penalty

        def extend(logprobs) -> tuple:
            """The K best continuations: scores, which beams they continue, tokens."""
            scores, at = jax.lax.top_k(logprobs.reshape(B, K * V), K)
            parent, token = at // V, (at % V).astype(jnp.int32)
            grown = jax.lax.dynamic_update_index_in_dim(gather(beams.open, parent), token, beams.length, 2)
            return scores, parent, token, grown

        scores, _, token, grown = extend(logprobs)
        ends = stop[token] | (length >= limit)
        scores = jnp.where(ends & beams.improvable[:, None], scores / weight, NONE)
        ended_scores, best = jax.lax.top_k(jnp.concatenate([beams.ended_scores, scores], 1), K)
        ended = gather(jnp.concatenate([beams.ended, grown], 1), best)
        is_ended = gather(jnp.concatenate([beams.is_ended, ends & beams.improvable[:, None]], 1), best)

        open_scores, parent, _, open = extend(jnp.where(stop, -jnp.inf, logprobs))
        state = reorder(state, (parent + offset).reshape(-1))
        # not open_scores[:, :1], the same number: with two slices of one top_k XLA's CPU backend sorts the vocabulary
        best_open = open_scores.max(1, keepdims=True)
        hope = best_open / weight > jnp.where(is_ended, ended_scores.min(1, keepdims=True), NONE)
        return Beams(state, length, open, open_scores, ended, ended_scores, is_ended, beams.improvable & hope.any(1))

    none = jnp.full((B, K, room), -1, jnp.int32)
    only_first = jnp.full((B, K), SHUT).at[:, 0].set(0)  # else K times the same hypothesis
    state = reorder(state, jnp.repeat(jnp.arange(B), K))
    start = Beams(
        state,
        jnp.int32(0),
        open=none,
        open_scores=only_first,
        ended=none,
        ended_scores=jnp.full((B, K), NONE),
        is_ended=jnp.zeros((B, K), bool),
        improvable=jnp.ones(B, bool),
    )
    found = jax.lax.while_loop(unfinished, body, start)
    return found.ended[:, 0], found.ended_scores[:, 0]
