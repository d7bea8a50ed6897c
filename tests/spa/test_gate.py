"""Training a gate, on scores whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.errors import ConfigError
from spa_jax.gate import ALWAYS, calibration_curve, choose_threshold, straight_through
from spa_jax.gate_fit import GateConfig, fit_gate
from spa_jax.plugin import Plugin
from spa_jax.score import TokenScores
from spa_jax.seam import Setting

KEY = jax.random.key(0)


def scores(seed: int, M: int = 2000, D: int = 12) -> TokenScores:
    """The sides differ by channel 0; where they do, the side network is right by channel 1, else the base is."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(M, D)).astype(np.float32) * np.geomspace(0.1, 100, D) + 3  # channels of any size
    z = (hidden - 3) / np.geomspace(0.1, 100, D)
    differs, right = z[:, 0] > 0, z[:, 1] > 0
    # a coin's worth of likelihood on tokens that both choose
    noise = rng.normal(size=M) * 0.05
    base = np.where(differs & right, 4.0, 0.5)
    side = np.where(differs, np.where(right, 0.5, 4.0), 0.5 - abs(noise))
    columns = hidden, base, side, differs, ~(differs & right), ~(differs & ~right)
    return TokenScores(*(np.asarray(x, bool if x.dtype == bool else np.float32) for x in columns))


def used(gate: dict, found: TokenScores, usage: float = 0.5) -> np.ndarray:
    p = found.probability(gate)
    return p >= choose_threshold(p, usage)


def test_a_gate_learns_where_the_two_sides_disagree():
    train, held = scores(0), scores(1)
    gate = fit_gate(train, GateConfig("disagreement"), Setting.SPA, KEY)
    assert (used(gate, held) == held.differs).mean() > 0.95


def test_by_default_a_use_has_a_price_where_g_adds():
    fit_for = lambda setting, **how: fit_gate(scores(0), GateConfig("marginal", **how), setting, KEY)  # noqa: E731
    for setting, price in ((Setting.SPA, 0.4), (Setting.S2, 0.0)):
        default = fit_gate(scores(0), GateConfig(), setting, KEY)
        jax.tree.map(np.testing.assert_array_equal, default, fit_for(setting, price=price))
    paid, free = (scores(1).probability(fit_for(setting)) for setting in (Setting.SPA, Setting.S2))
    assert paid.mean() < free.mean() - 0.05


def test_a_gate_learns_which_side_is_likelier():
    train, held = scores(0), scores(1)
    gate = fit_gate(train, GateConfig(price=0.0), Setting.SPA, KEY)
    p = held.probability(gate)
    better, worse = held.base_nll > 2, held.side_nll > 2
    assert p[better].mean() > 0.6 > 0.4 > p[worse].mean()
    curve = calibration_curve(p, held.base_nll, held.side_nll)
    assert min(point["loss"] for point in curve) < min(held.base_nll.mean(), held.side_nll.mean()) - 0.3
    best = np.minimum(held.base_nll, held.side_nll).mean()  # no choice of as many tokens is better than the oracle's
    assert all(best - 1e-6 <= point["oracle"] <= point["loss"] + 1e-6 for point in curve)
    assert curve[0]["oracle"] == pytest.approx(held.base_nll.mean())


def test_straight_through_is_a_step_with_the_gradient_of_p():
    logits = jnp.asarray([-3.0, -0.1, 0.1, 3.0])
    np.testing.assert_array_equal(straight_through(logits), [0, 0, 1, 1])
    p = jax.nn.sigmoid(logits)
    np.testing.assert_allclose(jax.vmap(jax.grad(straight_through))(logits), p * (1 - p), rtol=1e-5)


def test_decay_keeps_the_gate_small():
    one, ten = (fit_gate(scores(0), GateConfig(decay=decay), "spa", KEY)["kernel"] for decay in (0.1, 1.0))
    spread = np.asarray(scores(0).hidden).std(0)[:, None]  # decay is of the gate on standardised states
    assert np.abs(ten * spread).sum() < 0.5 * np.abs(one * spread).sum()


@pytest.mark.parametrize("method", ["marginal", "straight-through"])
def test_a_price_lowers_the_use(method):
    free, dear = (
        scores(1).probability(fit_gate(scores(0), GateConfig(method, price=price), Setting.SPA, KEY))
        for price in (0.0, 1.0)
    )
    assert dear.mean() < free.mean() - 0.1


def test_a_price_that_nothing_is_weighed_against_is_refused():
    for method in ("disagreement", "similarity"):
        with pytest.raises(ConfigError, match=r"price = 0\.5 with method .* weighs no likelihoods against it: use"):
            GateConfig(method, price=0.5)
    with pytest.raises(ConfigError, match="gate method = 'coin': expected one of marginal, straight-through"):
        GateConfig("coin")


def test_a_threshold_between_neighbours_of_float32():
    """Their middle rounds to one of them: the lower one would let both pass."""
    low = np.float32(0.5)
    while low < 0.51:
        high = np.nextafter(low, np.float32(1))
        p = np.array([high, low])
        assert (p >= choose_threshold(p, 0.5)).tolist() == [True, False]
        assert (jnp.asarray(p) >= choose_threshold(p, 0.5)).tolist() == [True, False]
        low += np.float32(0.0011)


@pytest.mark.parametrize("wanted, used", [(0.1, 0.0), (0.4, 0.6), (0.6, 0.6), (0.7, 0.6), (0.9, 1.0)])
def test_tokens_of_equal_probability_stay_together(wanted, used):
    p = np.repeat([0.9, 0.2], [60, 40])
    assert (p >= choose_threshold(p, wanted)).mean() == used


def test_small_usages_come_from_the_probabilities_that_there_are():
    rng = np.random.default_rng(0)
    p = rng.beta(2, 20, 100_000).astype(np.float32)
    curve = calibration_curve(p, np.ones(p.size), np.ones(p.size))
    plugin = Plugin(None, Setting.SPA, "base", "tokenizer", calibration=curve)
    for usage in (0.02, 0.04, 0.3):
        assert (p >= plugin.threshold_for(usage)).mean() == pytest.approx(usage, rel=0.5)
    for usage in (0.96, 0.98):  # nor do large ones become all
        assert 0.9 < (p >= plugin.threshold_for(usage)).mean() < 1
    assert plugin.threshold_for(1) == ALWAYS
