"""Importance: scores against brute force, and reordering that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.importance import Order, importance_order, measure_importance, reorder, reorder_lora
from mlfs_jax.model import forward
from tests.mlfs.tiny import FAMILIES, tiny_batch, tiny_decoder, tiny_lora, tiny_model, tiny_tokens


def measured(model, batches):
    def loss(base, batch):
        return (forward(model.graphdef, base, batch).logits ** 2).sum()

    return measure_importance(model, batches, loss), loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["sequence", "mlm"])
def test_reordering_leaves_the_function_unchanged(family, head):
    model = tiny_model(family, head=head)
    batch, lora = tiny_batch(model.config), tiny_lora(model)
    order = importance_order(measured(model, [batch])[0], model.config)
    moved = reorder(model, order)
    before = forward(model.graphdef, model.base, batch, lora=lora)
    after = forward(moved.graphdef, moved.base, batch, lora=reorder_lora(model, lora, order))
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-5)
    np.testing.assert_allclose(after.hidden, before.hidden[..., order.embed], atol=1e-5)
    assert not np.array_equal(order.embed, np.arange(24))
    back = reorder(moved, order.inverse())
    jax.tree.map(np.testing.assert_array_equal, back.base, model.base)


def test_scores_are_the_sum_of_weight_times_gradient():
    model = tiny_model()
    batch = tiny_batch(model.config)
    importance, loss = measured(model, [batch, batch])
    grads, weights = flatten(jax.grad(loss)(model.base, batch)), flatten(model.base)
    salience = {name: 2 * np.abs(leaf[...] * grads[name][...]) for name, leaf in weights.items()}
    mlp = salience["layers.up.kernel"].sum(1) + salience["layers.up.bias"] + salience["layers.down.kernel"].sum(2)
    np.testing.assert_allclose(importance.mlp, mlp, rtol=1e-4)
    heads = sum(salience[f"layers.{m}.kernel"].sum((1, 3)) + salience[f"layers.{m}.bias"].sum(2) for m in "qkv")
    np.testing.assert_allclose(importance.heads, heads + salience["layers.o.kernel"].sum((2, 3)), rtol=1e-4)
    layers = sum(s.reshape(3, -1).sum(1) for name, s in salience.items() if name.startswith("layers."))
    np.testing.assert_allclose(importance.layers, layers, rtol=1e-4)


def test_scores_of_a_bfloat16_base_are_added_in_float32():
    model = tiny_model().astype(jnp.bfloat16)
    batch = tiny_batch(model.config)
    importance, loss = measured(model, [batch])
    grads, weights = flatten(jax.jit(jax.grad(loss))(model.base, batch)), flatten(model.base)
    of = lambda leaf: np.asarray(leaf[...], np.float32)  # noqa: E731
    layers = [abs(of(w) * of(grads[name])).reshape(3, -1).sum(1) for name, w in weights.items() if "layers." in name]
    np.testing.assert_allclose(importance.layers, sum(layers), rtol=1e-4)


def test_query_heads_share_the_score_of_their_keys_and_values():
    """Grouped queries: half of what a key-value head scores, to each of the two that read it."""
    model, batch = tiny_decoder(), tiny_tokens(tiny_decoder().config)
    assert model.config.kv_group == 2
    importance, loss = measured(model, [batch])
    grads, weights = flatten(jax.grad(loss)(model.base, batch)), flatten(model.base)
    salience = {name: np.abs(leaf[...] * grads[name][...]) for name, leaf in weights.items()}
    heads = salience["layers.q.kernel"].sum((1, 3)) + salience["layers.o.kernel"].sum((2, 3))
    shared = sum(salience[f"layers.{m}.kernel"].sum((1, 3)) for m in "kv")
    np.testing.assert_allclose(importance.heads, heads + np.repeat(shared / 2, 2, 1), rtol=1e-4)


def test_a_dead_unit_comes_last():
    model = tiny_model()
    kernel = flatten(model.base)["layers.down.kernel"][...]
    dead = map_named(
        lambda name, leaf: kernel.at[1, 4].set(0) if name == "layers.down.kernel" else leaf[...], model.base
    )
    model = model.replace(base=dead)
    order = importance_order(measured(model, [tiny_batch(model.config)])[0], model.config)
    assert order.mlp[1, -1] == 4


def test_order_through_json():
    model = tiny_model()
    order = importance_order(measured(model, [tiny_batch(model.config)])[0], model.config)
    back = Order.from_json(order.to_json())
    for axis in ("embed", "heads", "mlp", "layers"):
        np.testing.assert_array_equal(getattr(back, axis), getattr(order, axis))
