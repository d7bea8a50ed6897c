"""Teacher-forced likelihoods of the tokens that count, by base and by side network: what a gate is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from mlfs_jax.data.batches import BUCKETS, eval_batches
from mlfs_jax.data.encoded import Encoded
from mlfs_jax.hosts import to_host
from mlfs_jax.model import Model, apply_head
from mlfs_jax.sharding import beside
from mlfs_jax.vocab import CHUNK, cross_entropy
from spa_jax.gate import gate_probability
from spa_jax.model import cloud_step, mix
from spa_jax.seam import Setting
from spa_jax.side import Side, device_step


@dataclass(frozen=True)
class TokenScores:
    """Of M tokens that count, each predicted from those before it.

    Attributes:
        hidden: f, what the gate reads.
        base_nll, side_nll: negative log-likelihood by f, and by what the gate chooses when it chooses the side network.
        differs: the two would choose different tokens.
        correct_base, correct_side: their first choice is the token.
    """

    hidden: Float[np.ndarray, "M D"]
    base_nll: Float[np.ndarray, " M"]
    side_nll: Float[np.ndarray, " M"]
    differs: Bool[np.ndarray, " M"]
    correct_base: Bool[np.ndarray, " M"]
    correct_side: Bool[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.base_nll)

    def probability(self, gate: dict) -> Float[np.ndarray, " M"]:
        """What a gate says of each token."""
        return np.asarray(gate_probability(gate, jnp.asarray(self.hidden)))


def score_tokens(
    model: Model,
    side: Side,
    setting: str,
    encoded: Encoded,
    *,
    batch_size: int = 16,
    before_each: Callable[[], None] = lambda: None,
) -> TokenScores:
    """Scores of every token of a split that counts; the side network sees all positions.

    Args:
        before_each: called before each batch, and may raise.
    """
    found, setting = [], Setting.parse(setting)
    side.check(model.decoder)
    widest = encoded.max_completion or encoded.max_length
    for batch in eval_batches(encoded, batch_size, buckets=BUCKETS):
        before_each()
        counts = batch["loss_mask"][:, 1:] > 0
        index = np.argsort(~counts, axis=1, kind="stable")[:, :widest]
        kept = np.take_along_axis(counts, index, 1)
        out = _score(model.graphdef, model.base, side, beside(model.base, batch), index, setting=setting)
        found.append([to_host(x)[kept] for x in out])
    return TokenScores(*(np.concatenate(column) for column in zip(*found, strict=True)))


@partial(jax.jit, static_argnames=("graphdef", "setting"))
def _score(graphdef, base, side: Side, batch, index, *, setting: Setting):
    cloud = cloud_step(graphdef, base, {}, None, batch, tapped=side.tapped)
    g, _ = device_step(side, None, cloud.frame)
    pick = lambda x: jnp.take_along_axis(x, index[..., None], 1)  # noqa: E731
    f, g = pick(cloud.hidden), pick(g)
    B, C = f.shape[:2]
    both = mix(setting, f, g, jnp.ones((B, C), bool))
    labels = jnp.take_along_axis(batch["input_ids"], index + 1, 1)
    size = min(CHUNK, B * C)
    missing = -(B * C) % size

    def chunks(x):
        x = x.reshape(B * C, *x.shape[2:])
        return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, size, *x.shape[1:])

    def one(chunk):
        f, h, label = chunk
        base_logits, side_logits = apply_head(graphdef, base, f), apply_head(graphdef, base, h)
        first, second = base_logits.argmax(-1), side_logits.argmax(-1)
        nlls = cross_entropy(base_logits, label), cross_entropy(side_logits, label)
        return *nlls, first != second, first == label, second == label

    scores = jax.lax.map(one, (chunks(f), chunks(both), chunks(labels)))
    return f, *(x.reshape(-1)[: B * C].reshape(B, C) for x in scores)
