"""Vocabulary losses in chunks: equal to the naive ones, in value and gradient, and smaller in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlfs_jax.distill import DistillConfig, kl
from mlfs_jax.model import apply_head, forward
from mlfs_jax.vocab import Hidden, lm_distill_loss, lm_loss, lm_loss_and_targets
from tests.mlfs.tiny import tiny_decoder, tiny_tokens


def naive(model, states, batch):
    logits = apply_head(model.graphdef, model.base, states)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
    weights = batch["loss_mask"][:, 1:]
    return (losses * weights).sum() / weights.sum()


@pytest.fixture(scope="module")
def case():
    model = tiny_decoder("gemma2")  # its head caps the logits
    batch = tiny_tokens(model.config, batch=3, length=9)
    batch["loss_mask"] = batch["loss_mask"].at[0, :5].set(0)  # a prompt
    states = forward(model.graphdef, model.base, batch, logits=False).hidden
    return model, batch, states


@pytest.mark.parametrize("chunk", [4, 7, 256])
def test_loss_and_gradient_equal_the_naive_ones(case, chunk):
    model, batch, states = case
    wanted, grad = jax.value_and_grad(lambda x: naive(model, x, batch))(states)
    chunked = lambda x: lm_loss(Hidden(model.graphdef, model.base, x), batch, chunk=chunk)  # noqa: E731
    found, found_grad = jax.value_and_grad(chunked)(states)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(found_grad, grad, atol=1e-6)
    np.testing.assert_allclose(chunked(states), wanted, rtol=1e-5)  # not differentiated


def test_an_unfrozen_head_gets_its_gradient(case):
    model, batch, states = case
    naive_grad = jax.grad(lambda base: naive(model.replace(base=base), states, batch))(model.base)
    grad = jax.grad(lambda base: lm_loss(Hidden(model.graphdef, base, states), batch, frozen=False, chunk=5))(
        model.base
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad, naive_grad)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_distillation_equals_the_naive_sum(case, alpha, keep):
    model, batch, states = case
    teacher, config = states + 0.3, DistillConfig(alpha=alpha, tau=2.0)

    def wanted(x):
        student, target = (apply_head(model.graphdef, model.base, s)[:, :-1] for s in (x, teacher))
        weights = batch["loss_mask"][:, 1:]
        return (1 - alpha) * naive(model, x, batch) + alpha * (kl(target, student, 2.0) * weights).sum() / weights.sum()

    def found(x, teacher):
        of = lambda states: Hidden(model.graphdef, model.base, states)  # noqa: E731
        target = lm_loss_and_targets(of(teacher), batch, config, chunk=5)[1] if keep else of(teacher)
        return lm_distill_loss(of(x), target, batch, config, chunk=5)

    value, (grad, to_teacher) = jax.value_and_grad(found, (0, 1))(states, teacher)
    np.testing.assert_allclose(value, wanted(states), rtol=1e-5, atol=1e-6)  # a difference of sums of some nats
    np.testing.assert_allclose(grad, jax.grad(wanted)(states), atol=1e-6)
    assert not to_teacher.any()


@pytest.mark.parametrize("divergence", ["kl", "reverse-kl", "jsd"])
def test_kept_targets_change_no_loss_and_no_gradient(case, divergence):
    model, batch, states = case
    of, config = lambda x: Hidden(model.graphdef, model.base, x), DistillConfig(divergence=divergence)
    wanted = jax.value_and_grad(lambda x: lm_loss(of(x), batch, chunk=5))(states)
    keeping = jax.value_and_grad(lambda x: lm_loss_and_targets(of(x), batch, config, chunk=5), has_aux=True)
    (loss, targets), grad = keeping(states)
    jax.tree.map(np.testing.assert_array_equal, (loss, grad), wanted)
    student = lambda x, teacher: lm_distill_loss(of(x), teacher, batch, config, chunk=5)  # noqa: E731
    found, anew = (jax.value_and_grad(student)(states - 0.3, teacher) for teacher in (targets, of(states)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, anew)


def test_peak_memory_does_not_hold_all_logits():
    """SmolLM2's vocabulary, 2,048 tokens: 384 MiB of fp32 logits, times what the naive form keeps of them."""
    model = tiny_decoder("llama", vocab_size=49152, tied=True)
    batch = {name: jax.ShapeDtypeStruct((8, 257), jnp.int32) for name in ("input_ids", "loss_mask")}
    states = jax.ShapeDtypeStruct((8, 257, model.config.embed), jnp.float32)

    def peak(loss):
        compiled = jax.jit(jax.grad(loss)).lower(states, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = peak(lambda x, batch: lm_loss(Hidden(model.graphdef, model.base, x), batch))
    logits = 8 * 256 * 49152 * 4
    assert peak(lambda x, batch: naive(model, x, batch)) >= logits
    assert chunked < logits / 3  # a chunk of 256 is an eighth, and its gradient


def test_a_prompt_costs_no_logits(case):
    """Chunks in which no token counts are skipped: NaN hidden states there do no harm."""
    model, batch, states = case
    batch = batch | {"loss_mask": jnp.zeros_like(batch["loss_mask"]).at[0, 3].set(1)}
    poisoned = jnp.full_like(states, jnp.nan).at[0, 2].set(states[0, 2])
    found = lm_loss(Hidden(model.graphdef, model.base, poisoned), batch, chunk=1)
    np.testing.assert_allclose(found, naive(model, states, batch), rtol=1e-5)
