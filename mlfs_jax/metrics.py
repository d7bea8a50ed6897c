"""Metrics: each takes (predictions [N], labels [N]) and returns a float; higher is better, but for perplexity.

Those of language take other pairs: perplexity summed losses and token counts, rouge texts and reference texts.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from mlfs_jax.errors import DataError, unknown


def _pair(predictions, labels) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(predictions), np.asarray(labels)
    if p.shape != y.shape or p.ndim != 1 or p.size == 0:
        raise DataError(f"a metric needs two non-empty vectors of one length, got shapes {p.shape} and {y.shape}.")
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


def perplexity(nll, tokens) -> float:
    """exp(sum(nll) / sum(tokens)), at least 1; lower is better.

    `nll` are summed negative log-likelihoods in nats, `tokens` how many tokens each is summed over: two numbers, or two
    vectors with an entry for each batch. They are added in float64.
    """
    total, count = np.sum(nll, dtype=np.float64), np.sum(tokens, dtype=np.float64)
    if np.shape(nll) != np.shape(tokens) or not count > 0:
        raise DataError(
            f"perplexity needs losses and how many tokens they are of, got shapes {np.shape(nll)} and "
            f"{np.shape(tokens)}, {count:g} tokens."
        )
    return float(np.exp(total / count))


class _Words:
    """rouge-score's default tokens (lower case, letters and digits), without its loss of all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures {"rouge1", "rouge2", "rougeL"} of texts against their references, in [0, 1] (Lin 2004).

    As the rouge-score package computes them, with no stemming: it would be English only. An empty text scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: about as long as the rest of the package

    if isinstance(predictions, str) or len(predictions) != len(references) or not len(references):
        raise DataError(
            f"rouge needs as many texts as references and at least one, got {len(predictions)} and {len(references)}."
        )
    scorer = RougeScorer(list(ROUGES), tokenizer=_Words())
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGES}


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of common words, as mean F-measure in [0, 1]; see `rouge`."""
    return rouge(predictions, references)["rouge1"]


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of common pairs of neighbouring words, as mean F-measure in [0, 1]; see `rouge`."""
    return rouge(predictions, references)["rouge2"]


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Longest common subsequence of words, as mean F-measure in [0, 1]; see `rouge`."""
    return rouge(predictions, references)["rougeL"]


ROUGES = ("rouge1", "rouge2", "rougeL")
METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "perplexity": perplexity,
    "rouge1": rouge1,
    "rouge2": rouge2,
    "rougeL": rouge_l,
}


def get_metric(name: str) -> Callable[..., float]:
    """The metric called `name`; raises `UnknownNameError` with the nearest names."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]
