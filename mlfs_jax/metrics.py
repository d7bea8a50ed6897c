"""Metrics in NumPy: each takes (predictions [N], labels [N]) and returns a float; higher is better."""

from collections.abc import Callable

import numpy as np

from mlfs_jax.errors import DataError, unknown


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(predictions), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise DataError(
            f"a metric needs two non-empty vectors of one length, got shapes {p.shape} and {y.shape}."
        )
    return p, y


def accuracy(predictions, labels) -> float:
    """Share of predictions that equal the label, in [0, 1]."""
    p, y = _pair(predictions, labels)
    return float(np.mean(p == y))


def f1(predictions, labels) -> float:
    """F1 of class 1, in [0, 1]; 0 when there is neither a hit nor a miss nor a false alarm to count."""
    p, y = _pair(predictions, labels)
    return _f1_of(p, y, 1)


def f1_macro(predictions, labels) -> float:
    """Unweighted mean of every class's F1, over the classes that occur in the labels or the predictions."""
    p, y = _pair(predictions, labels)
    return float(np.mean([_f1_of(p, y, c) for c in np.union1d(p, y)]))


def _f1_of(p: np.ndarray, y: np.ndarray, c: int) -> float:
    hits = np.sum((p == c) & (y == c))
    total = np.sum(p == c) + np.sum(y == c)
    return float(2 * hits / total) if total else 0.0


def matthews(predictions, labels) -> float:
    """Matthews correlation, any number of classes, in [-1, 1]; 0 where a side is constant (Gorodkin 2004)."""
    p, y = _pair(predictions, labels)
    classes = np.union1d(p, y)
    counts_p = np.array([np.sum(p == c) for c in classes], float)
    counts_y = np.array([np.sum(y == c) for c in classes], float)
    n = p.size
    cov = np.sum(p == y) * n - counts_p @ counts_y
    scale = np.sqrt((n * n - counts_p @ counts_p) * (n * n - counts_y @ counts_y))
    return float(cov / scale) if scale else 0.0


def pearson(predictions, labels) -> float:
    """Linear correlation, in [-1, 1]; 0 where a side is constant (a constant predictor explains nothing)."""
    p, y = (v.astype(np.float64) for v in _pair(predictions, labels))
    if np.all(p == p[0]) or np.all(y == y[0]):
        return 0.0
    p, y = p - p.mean(), y - y.mean()
    scale = np.sqrt((p @ p) * (y @ y))
    return float(p @ y / scale) if scale else 0.0


def spearman(predictions, labels) -> float:
    """Rank correlation, in [-1, 1]: `pearson` of the ranks, ties sharing their mean rank."""
    p, y = _pair(predictions, labels)
    return pearson(_ranks(p), _ranks(y))


def _ranks(v: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def get_metric(name: str) -> Callable[..., float]:
    """The metric called `name`; raises `UnknownNameError` with the nearest names."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]
