"""Metrics against scikit-learn and SciPy."""

import unicodedata

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from mlfs_jax import metrics
from mlfs_jax.errors import DataError, UnknownNameError


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_equal_sklearn(classes, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, 200)
    p = np.where(rng.random(200) < 0.6, y, rng.integers(0, classes, 200))
    assert metrics.accuracy(p, y) == pytest.approx(sklearn.metrics.accuracy_score(y, p))
    assert metrics.f1_macro(p, y) == pytest.approx(sklearn.metrics.f1_score(y, p, average="macro"))
    assert metrics.matthews(p, y) == pytest.approx(sklearn.metrics.matthews_corrcoef(y, p))
    if classes == 2:
        assert metrics.f1(p, y) == pytest.approx(sklearn.metrics.f1_score(y, p))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_scipy_with_ties(seed):
    rng = np.random.default_rng(seed)
    y = np.round(rng.normal(size=100), 1)
    p = np.round(y + rng.normal(size=100), 1)
    assert metrics.pearson(p, y) == pytest.approx(scipy.stats.pearsonr(p, y).statistic)
    assert metrics.spearman(p, y) == pytest.approx(scipy.stats.spearmanr(p, y).statistic)


def test_constant_predictions_score_zero_and_not_nan():
    y = np.array([0, 1, 1, 0])
    constant = np.zeros(4, int)
    assert metrics.matthews(constant, y) == 0
    assert metrics.f1(constant, y) == 0
    assert metrics.pearson(np.full(4, 0.1), y.astype(float)) == 0
    assert metrics.spearman(np.full(4, 0.1), y.astype(float)) == 0


def test_float32_scores_keep_their_precision():
    y = np.linspace(1000, 1001, 500, dtype=np.float32)
    assert metrics.pearson(y, y) == pytest.approx(1, abs=1e-12)


def test_perplexity_of_sums():
    assert metrics.perplexity(np.log(4) * 10, 10) == pytest.approx(4)
    assert metrics.perplexity([2.0, 6.0], [1, 3]) == pytest.approx(np.exp(2))
    many = np.full(100_000, 0.1, np.float32)  # added in float32 these would lose digits
    assert metrics.perplexity(many, np.ones(100_000)) == pytest.approx(np.exp(0.1), rel=1e-7)
    for nll, tokens in (([1.0], [0]), ([], []), ([1.0, 2.0], [3])):
        with pytest.raises(DataError, match="perplexity needs losses and how many tokens"):
            metrics.perplexity(nll, tokens)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "U.S.", "it's", "3-0", "snake_case", "Dogs"]


def test_rouge_equals_the_package_on_ascii():
    from rouge_score.rouge_scorer import RougeScorer

    rng = np.random.default_rng(0)
    texts, references = ([" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(20)] for _ in range(2))
    oracle = RougeScorer(["rouge1", "rouge2", "rougeL"])
    want = [oracle.score(r, t) for t, r in zip(texts, references, strict=True)]
    scores = metrics.rouge(texts, references)
    for name, value in scores.items():
        assert value == pytest.approx(np.mean([w[name].fmeasure for w in want]))
        assert metrics.get_metric(name)(texts, references) == value


def test_rouge_keeps_letters_that_english_has_not():
    assert metrics.rouge_l(["économiste née"], ["économiste né"]) == pytest.approx(0.5)
    assert metrics.rouge(["государство"], ["Государство"]) == {"rouge1": 1, "rouge2": 0, "rougeL": 1}
    assert metrics.rouge1(["", "a"], ["a", "a"]) == 0.5
    assert metrics.rouge1([unicodedata.normalize("NFD", "économiste né")], ["économiste né"]) == 1


def test_rouge_needs_pairs_of_texts():
    for texts, references in ((["a"], []), ([], []), ("abc", ["a", "b", "c"])):
        with pytest.raises(DataError, match="as many texts as references"):
            metrics.rouge(texts, references)


def test_mistakes_are_named():
    with pytest.raises(DataError, match=r"\(3,\) and \(2,\)"):
        metrics.accuracy(np.zeros(3), np.zeros(2))
    with pytest.raises(DataError, match="non-empty"):
        metrics.accuracy([], [])
    with pytest.raises(UnknownNameError, match="'accuracy'"):
        metrics.get_metric("acuracy")
    assert metrics.get_metric("f1") is metrics.f1
