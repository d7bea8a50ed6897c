"""Token after token, as one ``while_loop`` on the device, over any pure step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.generate.sampling import Sampling, pick

State = Any
"""What a step function remembers of the texts so far: any pytree, a key-value cache for example."""

Step = Callable[[State, Int[Array, " B"], Bool[Array, " B"]], tuple[Float[Array, "B V"], State]]
"""``step(state, tokens, alive) -> (logits of the next token, state)``: reads one more token of each row.

Rows that are not alive have ended: their token is no part of the text and their logits are not used."""


@partial(jax.tree_util.register_dataclass, data_fields=["state", "last", "done", "score", "count"], meta_fields=[])
@dataclass(frozen=True)
class Rows:
    """Texts in progress.

    Attributes:
        state: what the step function remembers; it has not seen ``last`` yet.
        last: [B], the last token of each row.
        done: [B], whether that is a stop token.
        score: [B], the sum of the log-probabilities of the tokens so far (of the model: temperature 1, all tokens).
        count: steps so far.
    """

    state: State
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    score: Float[Array, " B"]
    count: Int[Array, ""]

    @classmethod
    def begin(cls, state: State, first: Int[Array, " B"]) -> Rows:
        """Before the first step; ``first`` is the last token of each prompt."""
        B = len(first)
        return cls(state, first, jnp.zeros(B, bool), jnp.zeros(B), jnp.int32(0))


def advance(
    step: Step, rows: Rows, stop: Bool[Array, " V"], sampling: Sampling | None, key: Array
) -> tuple[Rows, Int[Array, " B"]]:
    """One more token for every row, and which; -1 for a row that had ended before."""
    logits, state = step(rows.state, rows.last, ~rows.done)
    logits = logits.astype(jnp.float32)
    token = pick(logits, sampling, jax.random.fold_in(key, rows.count))
    logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)
    after = Rows(
        state,
        last=jnp.where(rows.done, rows.last, token),
        done=rows.done | stop[token],
        score=rows.score + jnp.where(rows.done, 0, logprob),
        count=rows.count + 1,
    )
    return after, jnp.where(rows.done, -1, token)


def decode(
    step: Step,
    state: State,
    first: Int[Array, " B"],
    *,
    room: int,
    limit: Int[Array, ""],
    stop: Bool[Array, " V"],
    sampling: Sampling | None = None,
    key: Array,
) -> tuple[Rows, Int[Array, "B M"]]:
    """Greedy decoding or sampling until every row has ended, or for ``limit`` tokens.

    Args:
        step: see :data:`Step`.
        state: after all tokens of the prompts but their last ones, which are ``first``.
        room: M, static: columns of the result.
        limit: tokens at most; an array, from 1 to ``room``.
        stop: which tokens end a text.
        sampling: None: greedy.
        key: of the random draws; step i uses fold_in(key, i).

    Returns the rows at the end, and their new tokens: stop tokens included, -1 behind.
    """

    def unfinished(carry):
        rows, _ = carry
        return (rows.count < limit) & ~rows.done.all()

    def body(carry):
        rows, out = carry
        after, token = advance(step, rows, stop, sampling, key)
        return after, out.at[:, rows.count].set(token)

    return jax.lax.while_loop(unfinished, body, (Rows.begin(state, first), jnp.full((len(first), room), -1, jnp.int32)))
