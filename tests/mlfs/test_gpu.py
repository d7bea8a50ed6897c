"""On an accelerator: the same logits masked and sliced, and a step that trains. See CONTRIBUTING for the command."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlfs_jax as mlfs
from mlfs_jax.backbone.attention import attention
from mlfs_jax.supernet import Supernet
from tests.mlfs.tiny import tiny_batch, tiny_lora, tiny_model

pytestmark = pytest.mark.gpu


def test_masked_equals_sliced_at_full_precision():
    model = tiny_model()
    batch, lora = tiny_batch(model.config), tiny_lora(model)
    subnet = mlfs.Subnet(12, (2, 1), (7, 13), (0, 2))
    with jax.default_matmul_precision("highest"):
        mask = mlfs.make_mask(model.config, subnet)
        masked = mlfs.forward(model.graphdef, model.base, batch, lora=lora, mask=mask).logits
        small = mlfs.slice_subnet(model, subnet, lora=lora)
        np.testing.assert_allclose(mlfs.forward(small.graphdef, small.base, batch).logits, masked, atol=1e-4)


@pytest.mark.parametrize("execution", ["masked", "sliced"])
def test_a_step_lowers_the_loss(execution):
    model = tiny_model()
    batch, minnet = tiny_batch(model.config), mlfs.SubnetSpace.from_ratios(model.config, width=(1, 0.5)).minnet
    supernet = Supernet(model.config, mlfs.DistillConfig(beta=0), optax.adam(1e-2), execution)
    state, losses = supernet.init({"lora": tiny_lora(model)}), []
    for _ in range(20):
        state, step_losses = supernet.step(state, model.base, batch, (minnet,), 0.0)
        losses.append(np.asarray(step_losses))
    assert (losses[-1] < losses[0]).all()


def test_cudnn_attention_is_attention(monkeypatch):
    """Values and gradients in bfloat16, with padding on either side and shared keys, beside float32."""
    rng, B, T, N, K, H = np.random.default_rng(0), 3, 64, 4, 2, 32
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K))
    real = (np.arange(T) >= 5) & (np.arange(T) < np.array([T, 40, 17])[:, None])
    visible = jnp.asarray(np.tril(np.ones((T, T), bool)) & real[:, None])
    total = lambda *qkv: (attention(*qkv, visible)[real].astype(jnp.float32) ** 2).sum()  # noqa: E731
    exact = jax.grad(total, (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    monkeypatch.setenv("MLFS_ATTENTION", "cudnn")
    for found, wanted in zip(jax.grad(total, (0, 1, 2))(q, k, v), exact, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.05 * np.abs(wanted).max())
