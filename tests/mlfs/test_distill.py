"""Divergences against torch, the feature loss against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mlfs_jax as mlfs
from mlfs_jax.distill import (
    DistillConfig,
    feature_loss,
    init_projection,
    jsd,
    kl,
    logit_loss,
    reverse_kl,
    task_loss,
    teacher_layers,
)
from mlfs_jax.errors import ConfigError, UnknownNameError
from mlfs_jax.model import forward
from tests.mlfs.tiny import tiny_batch, tiny_model

rng = np.random.default_rng(0)
TEACHER, STUDENT = (rng.normal(0, 2, (5, 7)).astype(np.float32) for _ in range(2))


def torch_kl(p, q, tau):
    """KL(p || q) of softened distributions, per row."""
    p, q = (torch.log_softmax(torch.tensor(x) / tau, -1) for x in (p, q))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_kl_and_reverse_kl_equal_torch(tau):
    np.testing.assert_allclose(kl(TEACHER, STUDENT, tau), tau**2 * torch_kl(TEACHER, STUDENT, tau), rtol=1e-4)
    np.testing.assert_allclose(reverse_kl(TEACHER, STUDENT, tau), tau**2 * torch_kl(STUDENT, TEACHER, tau), rtol=1e-4)


def test_jsd_is_symmetric_bounded_and_tends_to_kl():
    np.testing.assert_allclose(jsd(TEACHER, STUDENT), jsd(STUDENT, TEACHER), rtol=1e-4)
    assert (jsd(TEACHER, STUDENT) <= np.log(2)).all()
    beta = 1e-3  # GKD: JSD_beta / beta -> KL(teacher || student) as beta -> 0
    np.testing.assert_allclose(jsd(TEACHER, STUDENT, beta=beta) / beta, kl(TEACHER, STUDENT), rtol=0.05)


@pytest.mark.parametrize("divergence", [kl, reverse_kl, jsd])
def test_no_divergence_from_oneself(divergence):
    np.testing.assert_allclose(divergence(TEACHER, TEACHER, 2.0), 0, atol=1e-6)
    assert (divergence(TEACHER, STUDENT, 2.0) > 0).all()


def test_task_losses():
    labels = np.array([0, 6, 2, 3, 1])
    expected = torch.nn.functional.cross_entropy(torch.tensor(STUDENT), torch.tensor(labels)).item()
    np.testing.assert_allclose(task_loss(STUDENT, labels, "classification"), expected, rtol=1e-5)
    scores = np.array([0.5, -1, 2, 0, 1], np.float32)
    np.testing.assert_allclose(
        task_loss(STUDENT[:, :1], scores, "regression"), np.mean((STUDENT[:, 0] - scores) ** 2), rtol=1e-5
    )
    half = [jnp.asarray(x[:, :1], jnp.bfloat16) for x in (TEACHER, STUDENT)]
    found = logit_loss(*half, DistillConfig(), "regression")
    teacher, student = (np.asarray(x, np.float32) for x in half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.mean((teacher - student) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("kept", "teachers"),
    [((0, 1, 2), {0: 0, 1: 1, 2: 2}), ((0, 2), {0: 0, 2: 2}), ((0,), {0: 2}), ((1, 2), {1: 0, 2: 2})],
)
def test_each_kept_layer_has_its_teacher_and_the_last_learns_from_the_last(kept, teachers):
    config = tiny_model().config
    n = len(kept)
    mapped = np.asarray(teacher_layers(mlfs.make_mask(config, mlfs.Subnet(24, (4,) * n, (20,) * n, kept))))
    assert {layer: int(mapped[layer]) for layer in kept} == teachers


def test_feature_loss_is_blind_to_padding_to_skipped_layers_and_to_the_scale_of_the_projection():
    teacher, student = (jnp.asarray(rng.normal(size=(3, 2, 4, 24)), jnp.float32) for _ in range(2))
    config = tiny_model().config
    mask = mlfs.make_mask(config, mlfs.Subnet(24, (4, 4), (20, 20), (0, 2)))
    tokens = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    projection = init_projection(jax.random.key(0), 24, DistillConfig(feature_dim=6))
    np.testing.assert_allclose(projection.T @ projection, np.eye(6), atol=1e-5)
    loss = feature_loss(teacher, student, projection, mask, tokens, "all")
    elsewhere = student.at[1].add(9.0).at[:, 1, 2:].add(9.0)  # the skipped layer, the padded tokens
    np.testing.assert_allclose(feature_loss(teacher, elsewhere, projection, mask, tokens, "all"), loss, rtol=1e-5)
    np.testing.assert_allclose(feature_loss(teacher, student, 7 * projection, mask, tokens, "all"), loss, rtol=1e-4)
    slope = jax.grad(lambda u: feature_loss(teacher, student, u, mask, tokens, "all"))(projection)
    assert abs(slope).max() > 1e-2 and abs((slope * projection).sum()) < 1e-4  # it turns U, and does not shrink it
    assert feature_loss(teacher, teacher, projection, mask, tokens, "last") < 1e-6 < loss
    t, s = (np.asarray(x @ projection)[2][np.asarray(tokens) > 0] for x in (teacher, student))
    expected = np.mean((t - s) ** 2) / np.mean(t**2)
    last = feature_loss(teacher, student, projection, mask, tokens, "last")
    np.testing.assert_allclose(last, expected, rtol=1e-4)


def test_feature_loss_of_masked_and_sliced_runs_agree():
    model = tiny_model()
    batch, subnet = tiny_batch(model.config), mlfs.Subnet(11, (2, 2, 2), (7, 7, 7), (0, 1, 2))
    mask, small = mlfs.make_mask(model.config, subnet), mlfs.slice_subnet(model, subnet)
    projection = init_projection(jax.random.key(0), 24, DistillConfig(feature_dim=6))
    teacher = forward(model.graphdef, model.base, batch, taps=True).taps
    losses = [
        feature_loss(teacher, taps, projection, mask, batch["attention_mask"], "all")
        for taps in (
            forward(model.graphdef, model.base, batch, mask=mask, taps=True).taps,
            forward(small.graphdef, small.base, batch, taps=True).taps,
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"alpha = 1\.5"):
        DistillConfig(alpha=1.5)
    with pytest.raises(ConfigError, match="tau = 0"):
        DistillConfig(tau=0)
    for name in ("tau", "beta"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"{name} = {value}.*finite"):
                DistillConfig(**{name: value})
    with pytest.raises(UnknownNameError, match="did you mean 'reverse-kl'"):
        DistillConfig(divergence="reverse_kl")
    with pytest.raises(ConfigError, match="features = 'some'"):
        DistillConfig(features="some")
