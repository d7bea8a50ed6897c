"""How good a model is on a task."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlfs_jax.data.batches import eval_batches, prompt_batches
from mlfs_jax.data.encode import Encoded, load_tokenizer
from mlfs_jax.distill import task_loss
from mlfs_jax.generate import GenerateConfig, generate
from mlfs_jax.hosts import to_host
from mlfs_jax.metrics import get_metric, perplexity, rouge
from mlfs_jax.model import Model, forward
from mlfs_jax.sharding import beside
from mlfs_jax.vocab import Hidden, lm_loss


def predict(model: Model, encoded: Encoded, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Logits [examples, C] in float32, labels [examples] of a model with a sequence head (in order of length)."""
    logits, labels = [], []
    for batch in eval_batches(encoded, batch_size):
        real = batch.pop("weight") > 0
        found = to_host(forward(model.graphdef, model.base, beside(model.base, batch)).logits)[real]
        logits.append(found.astype(np.float32))  # a mean over bfloat16 stands still after a few hundred examples
        labels.append(batch["labels"][real])
    return np.concatenate(logits), np.concatenate(labels)


def evaluate(model: Model, encoded: Encoded, metric: str, *, batch_size: int = 64) -> dict[str, float]:
    """``{metric: ..., "loss": ...}``: the task's metric, and mean cross-entropy or squared error.

    Of a language model: ``{"perplexity": ..., "loss": ...}`` over the tokens that count, the loss in nats for each.
    """
    if model.config.head == "lm":
        return _evaluate_language(model, encoded, min(batch_size, 16))
    logits, labels = predict(model, encoded, batch_size=batch_size)
    problem = model.config.problem
    predictions = logits[:, 0] if problem == "regression" else logits.argmax(-1)
    loss = task_loss(jnp.asarray(logits), jnp.asarray(labels), problem)
    return {metric: float(get_metric(metric)(predictions, labels)), "loss": float(loss)}


def _evaluate_language(model: Model, encoded: Encoded, batch_size: int) -> dict[str, float]:
    total = tokens = 0.0
    for batch in eval_batches(encoded, batch_size):
        batch.pop("weight")  # rows that only fill up have no token that counts
        count = float(batch["loss_mask"][:, 1:].sum())
        total += count * float(_lm_loss(model.graphdef, model.base, beside(model.base, batch)))
        tokens += count
    return {"perplexity": perplexity(total, tokens), "loss": total / tokens}


@partial(jax.jit, static_argnames="graphdef")
def _lm_loss(graphdef: nnx.GraphDef, base: nnx.State, batch: dict) -> jax.Array:
    hidden = forward(graphdef, base, batch, logits=False).hidden
    return lm_loss(Hidden(graphdef, base, hidden), batch)


def evaluate_completions(model: Model, encoded: Encoded, *, beams: int = 1, batch_size: int = 16) -> dict[str, float]:
    """Mean Rouge-1, -2 and -L F-measures of the completions that the model writes, against the references.

    Args:
        encoded: a split of a task with prompts; every one of them is completed.
        beams: of a beam search; 1: greedy.
    """
    tokenizer, texts, references = load_tokenizer(model.source), [], []
    config = GenerateConfig(max_new_tokens=encoded.max_completion, beams=beams)
    for batch, wanted in prompt_batches(encoded, batch_size):
        found = generate(model, batch, config).tokens[: len(wanted)]
        texts += [tokenizer.decode(tokens).strip() for tokens in found]
        references += wanted
    return rouge(texts, references)
