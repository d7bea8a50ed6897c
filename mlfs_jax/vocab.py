"""Losses of language models, over the vocabulary in chunks: [B, T, V] logits are never all in memory.

Tokens go through the head a few hundred at a time. The head is frozen, so the gradient of the hidden states is all
that is wanted, and it is computed on the way forward, while a chunk's logits are there (as fused linear cross-entropy
kernels do): the backward pass makes no logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@partial(jax.tree_util.register_dataclass, data_fields=["chunks"], meta_fields=[])
@dataclass(frozen=True)
class Targets:
    """A teacher's half of the divergence, kept: for every chunk of tokens [N, C], a tree of [N, C] and [N, C, V]."""

    chunks: Any


def lm_loss(hidden: Hidden, batch: Mapping, *, frozen: bool = True, chunk: int = CHUNK) -> Float[Array, ""]:
    """Mean cross-entropy of the tokens that count (``loss_mask``), each predicted from those before it.

    Args:
        batch: ``input_ids`` and ``loss_mask`` [B, T]; ``loss_mask[:, 0]`` cannot count.
        frozen: no gradient is asked for but that of the hidden states. False computes that of the head, too (to
            measure importance), at the cost of making every chunk's logits twice.
    """
    return _lm_loss(hidden, batch, frozen, chunk, lambda logits: ())[0]


def lm_loss_and_targets(
    hidden: Hidden, batch: Mapping, config: DistillConfig, *, chunk: int = CHUNK
) -> tuple[Float[Array, ""], Targets]:
    """:func:`lm_loss`, and what students of ``hidden`` need of the logits, for :func:`lm_distill_loss`.

    That is B T V numbers: for vocabularies and batches where it is little, and several students learn from them.
    """
    targets = partial(DIVERGENCES[config.divergence].targets, tau=config.tau)
    loss, kept = _lm_loss(hidden, batch, True, chunk, targets)
    return loss, Targets(jax.lax.stop_gradient(kept))


def _lm_loss(hidden: Hidden, batch: Mapping, frozen: bool, chunk: int, keep: Callable):
    def loss(states, aux, base):
        logits = apply_head(hidden.graphdef, base, states)
        return (aux["weight"] * cross_entropy(logits, aux["label"])).sum(), keep(logits)

    chunks = _chunks(_tokens(batch) | {"states": _predicting(hidden.states)}, chunk)
    return _mean_over_chunks(loss, chunks, hidden.base, frozen)


def lm_distill_loss(
    student: Hidden, teacher: Hidden | Targets, batch: Mapping, config: DistillConfig, *, chunk: int = CHUNK
) -> Float[Array, ""]:
    """(1 - alpha) CE(y, student) + alpha D(teacher || student), mean over the tokens that count.

    Both distributions of a chunk are there together, and gone with it.

    Args:
        teacher: what its head reads; or what :func:`lm_loss_and_targets` has kept, of the same batch and chunk.
    """
    divergence = DIVERGENCES[config.divergence]

    def loss(states, aux, bases):
        logits = apply_head(student.graphdef, bases[0], states)
        total = (1 - config.alpha) * cross_entropy(logits, aux["label"])
        if config.alpha:
            targets = aux["teacher"]
            if isinstance(teacher, Hidden):
                targets = divergence.targets(apply_head(teacher.graphdef, bases[1], targets), config.tau)
            total += config.alpha * divergence.loss(targets, logits, config.tau)
        return (aux["weight"] * total).sum(), ()

    tokens = _tokens(batch) | {"states": _predicting(student.states)}
    if isinstance(teacher, Hidden):
        chunks = _chunks(tokens | {"teacher": _predicting(jax.lax.stop_gradient(teacher.states))}, chunk)
        bases = student.base, teacher.base
    else:
        chunks, bases = _chunks(tokens, chunk) | {"teacher": teacher.chunks}, (student.base, None)
    return _mean_over_chunks(loss, chunks, bases, True)[0]


def _predicting(states: Float[Array, "B T D"]) -> Float[Array, "M D"]:
    """The states that predict a token: all but each row's last."""
    return states[:, :-1].reshape(-1, states.shape[-1])


def _tokens(batch: Mapping) -> dict[str, Array]:
    """Of each prediction, [M]: the token that is right, and whether it counts."""
    return {
        "label": batch["input_ids"][:, 1:].reshape(-1),
        "weight": batch["loss_mask"][:, 1:].reshape(-1).astype(jnp.float32),
    }


def cross_entropy(logits: Float[Array, "M V"], labels: Int[Array, " M"]) -> Float[Array, " M"]:
    picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - picked


def _chunks(tokens: dict[str, Array], size: int) -> dict[str, Array]:
    """Per-token arrays [M, ...] as chunks [N, C, ...]; tokens of ``weight`` 0 come last, behind them padding."""
    order = jnp.argsort(tokens["weight"] == 0, stable=True)
    size = min(size, len(order))
    missing = -len(order) % size

    def chunks(x):
        x = jnp.pad(jnp.asarray(x)[order], [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(chunks, tokens)


def _mean_over_chunks(loss: Callable, chunks: dict[str, Array], shared, frozen: bool) -> tuple[Float[Array, ""], Any]:
    """``loss(states [C, D], aux {name: [C, ...]}, shared) -> (sum, kept)``: the mean over weights, and what is kept.

    Chunks whose tokens have all weight 0 are skipped: a prompt costs no logits.
    """
    states, aux = chunks["states"], {name: x for name, x in chunks.items() if name != "states"}
    total, kept = (_frozen_sum if frozen else _sum)(loss if frozen else jax.checkpoint(loss), states, aux, shared)
    return total / jnp.maximum(aux["weight"].sum(), 1.0), kept


def _sum(loss, states, aux, shared):
    def step(total, xs):
        value, kept = loss(*xs, shared)
        return total + value, kept

    return jax.lax.scan(step, jnp.zeros(()), (states, aux))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_sum(loss, states, aux, shared):
    return _sum(partial(_if_any, loss), states, aux, shared)


def _frozen_sum_forward(loss, states, aux, shared):
    def step(total, xs):
        (value, kept), grad = _if_any(jax.value_and_grad(loss, has_aux=True), *xs, shared)
        return total + value, (kept, grad)

    total, (kept, grads) = jax.lax.scan(step, jnp.zeros(()), (states, aux))
    return (total, kept), grads


def _if_any(f, states, aux, shared):
    """``f`` of a chunk in which some token counts, else zeros."""
    run = lambda states, aux: f(states, aux, shared)  # noqa: E731
    shapes = jax.eval_shape(run, states, aux)
    nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    return jax.lax.cond(aux["weight"].any(), run, nothing, states, aux)


_frozen_sum.defvjp(_frozen_sum_forward, lambda loss, grads, g: (g[0] * grads, None, None))
