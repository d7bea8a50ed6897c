"""Losses of language models, over the vocabulary in chunks: [B, T, V] logits are never all in memory.

Tokens go through the head a few hundred at a time. The head is frozen, so the gradient of the hidden states is all
that is wanted, and it is computed on the way forward, while a chunk's logits are there (as fused linear cross-entropy
kernels do): the backward pass makes no logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mlfs_jax.distill import DIVERGENCES, DistillConfig
from mlfs_jax.model import apply_head

CHUNK = 256
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class Hidden:
    """Hidden states and the model whose head reads them.

    Attributes:
        graphdef, base: of that model.
        states: [B, T, D], ``Output.hidden``.
    """

    graphdef: nnx.GraphDef
    base: nnx.State
    states: Float[Array, "B T D"]


def lm_loss(hidden: Hidden, batch: Mapping, *, frozen: bool = True, chunk: int = CHUNK) -> Float[Array, ""]:
    """Mean cross-entropy of the tokens that count (``loss_mask``), each predicted from those before it.

    Args:
        batch: ``input_ids`` and ``loss_mask`` [B, T]; ``loss_mask[:, 0]`` cannot count.
        frozen: no gradient is asked for but that of the hidden states. False computes that of the head, too (to
            measure importance), at the cost of making every chunk's logits twice.
    """
    labels, weights = _targets(batch)

    def loss(states, aux, base):
        logits = apply_head(hidden.graphdef, base, states)
        return (aux["weight"] * cross_entropy(logits, aux["label"])).sum()

    aux = {"label": labels, "weight": weights}
    return sum_over_chunks(loss, _predicting(hidden.states), aux, hidden.base, frozen, chunk) / _count(weights)


def lm_distill_loss(
    student: Hidden, teacher: Hidden, batch: Mapping, config: DistillConfig, *, chunk: int = CHUNK
) -> Float[Array, ""]:
    """(1 - alpha) CE(y, student) + alpha D(teacher || student), mean over the tokens that count.

    Both distributions of a chunk are there together, and gone with it.
    """
    labels, weights = _targets(batch)
    divergence = DIVERGENCES[config.divergence]

    def loss(states, aux, bases):
        logits = apply_head(student.graphdef, bases[0], states)
        total = (1 - config.alpha) * cross_entropy(logits, aux["label"])
        if config.alpha:
            target = apply_head(teacher.graphdef, bases[1], aux["teacher"])
            total += config.alpha * divergence(target, logits, config.tau)
        return (aux["weight"] * total).sum()

    aux = {"label": labels, "weight": weights, "teacher": _predicting(jax.lax.stop_gradient(teacher.states))}
    bases = (student.base, teacher.base)
    return sum_over_chunks(loss, _predicting(student.states), aux, bases, True, chunk) / _count(weights)


def _predicting(states: Float[Array, "B T D"]) -> Float[Array, "M D"]:
    """The states that predict a token: all but each row's last."""
    return states[:, :-1].reshape(-1, states.shape[-1])


def _targets(batch: Mapping) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    return batch["input_ids"][:, 1:].reshape(-1), batch["loss_mask"][:, 1:].reshape(-1).astype(jnp.float32)


def _count(weights: Float[Array, " M"]) -> Float[Array, ""]:
    return jnp.maximum(weights.sum(), 1.0)


def cross_entropy(logits: Float[Array, "M V"], labels: Int[Array, " M"]) -> Float[Array, " M"]:
    picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - picked


def sum_over_chunks(
    loss: Callable, states: Float[Array, "M D"], aux: dict, shared, frozen: bool, chunk: int
) -> Float[Array, ""]:
    """The sum of ``loss(states [C, D], aux [C, ...], shared)`` over chunks of C tokens.

    Tokens of weight 0 are moved to the end, and chunks of them alone are skipped: a prompt costs no logits.
    """
    order = jnp.argsort(aux["weight"] == 0, stable=True)
    size = min(chunk, len(order))
    missing = -len(order) % size

    def chunks(x):
        x = jnp.pad(jnp.asarray(x)[order], [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, size, *x.shape[1:])

    states, aux = chunks(states), jax.tree.map(chunks, aux)
    if frozen:
        return _frozen_sum(loss, states, aux, shared)
    once = jax.checkpoint(loss)
    return jax.lax.scan(lambda total, xs: (total + once(*xs, shared), None), jnp.zeros(()), (states, aux))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_sum(loss, states, aux, shared):
    return jax.lax.scan(lambda total, xs: (total + _if_any(loss, 0.0, *xs, shared), None), 0.0, (states, aux))[0]


def _frozen_sum_forward(loss, states, aux, shared):
    def step(total, xs):
        nothing = 0.0, jnp.zeros_like(xs[0])
        value, grad = _if_any(jax.value_and_grad(loss), nothing, *xs, shared)
        return total + value, grad

    return jax.lax.scan(step, 0.0, (states, aux))


def _if_any(f, nothing, states, aux, shared):
    """``f`` of a chunk in which some token counts, else ``nothing``."""
    run = lambda states, aux: f(states, aux, shared)  # noqa: E731
    return jax.lax.cond(aux["weight"].any(), run, lambda *_: nothing, states, aux)


_frozen_sum.defvjp(_frozen_sum_forward, lambda loss, grads, g: (g * grads, None, None))
