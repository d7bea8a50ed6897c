"""Metrics against scikit-learn and SciPy."""

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


def test_mistakes_are_named():
    with pytest.raises(DataError, match=r"\(3,\) and \(2,\)"):
        metrics.accuracy(np.zeros(3), np.zeros(2))
    with pytest.raises(DataError, match="non-empty"):
        metrics.accuracy([], [])
    with pytest.raises(UnknownNameError, match="'accuracy'"):
        metrics.get_metric("acuracy")
    assert metrics.get_metric("f1") is metrics.f1
