"""How good a model is on a task."""

from __future__ import annotations

import numpy as np

from mlfs_jax.data.batches import eval_batches
from mlfs_jax.data.encode import Encoded
from mlfs_jax.metrics import get_metric
from mlfs_jax.model import Model, forward


def predict(model: Model, encoded: Encoded, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Logits [examples, C] and labels [examples] of a model with a sequence head (in order of length)."""
    logits, labels = [], []
    for batch in eval_batches(encoded, batch_size):
        real = batch.pop("weight") > 0
        logits.append(np.asarray(forward(model.graphdef, model.base, batch).logits)[real])
        labels.append(batch["labels"][real])
    return np.concatenate(logits), np.concatenate(labels)


def evaluate(model: Model, encoded: Encoded, metric: str, *, batch_size: int = 64) -> dict[str, float]:
    """``{metric: ..., "loss": ...}``: the task's metric, and mean cross-entropy or squared error."""
    logits, labels = predict(model, encoded, batch_size=batch_size)
    if model.config.problem == "regression":
        predictions = logits[:, 0]
        loss = np.mean((predictions - labels) ** 2)
    else:
        predictions = logits.argmax(-1)
        log_norm = np.logaddexp.reduce(logits, -1)
        loss = np.mean(log_norm - logits[np.arange(len(labels)), labels])
    return {metric: float(get_metric(metric)(predictions, labels)), "loss": float(loss)}
