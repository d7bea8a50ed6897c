"""Decoders as supernets: masked == sliced, reordering by whole key-value groups, block influence."""

import jax
import numpy as np
import optax
import pytest

import mlfs_jax as mlfs
from mlfs_jax.distill import DistillConfig, init_projection
from mlfs_jax.errors import SubnetError
from mlfs_jax.importance import block_influence, importance_order, measure_importance, reorder, reorder_lora
from mlfs_jax.model import forward
from mlfs_jax.subnet import num_params
from mlfs_jax.supernet import Supernet
from mlfs_jax.timing import count_flops
from tests.mlfs.tiny import DECODERS, random_lora, tiny_batch, tiny_decoder, tiny_model, tiny_tokens

TOLERANCE = 1e-4  # fp32 logits

SUBNETS = {  # full is the one kind of norm that needs the same heads in every layer
    "olmo2": mlfs.Subnet(13, (2, 2), (13, 13), (0, 2)),
    None: mlfs.Subnet(13, (4, 2), (7, 13), (0, 2)),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_masked_equals_sliced(kind):
    model, subnet = tiny_decoder(kind), SUBNETS.get(kind, SUBNETS[None])
    batch, lora = tiny_tokens(model.config), random_lora(model)
    masked = forward(model.graphdef, model.base, batch, lora=lora, mask=mlfs.make_mask(model.config, subnet), taps=True)
    small = mlfs.slice_subnet(model, subnet, lora=lora)
    sliced = forward(small.graphdef, small.base, batch, taps=True)
    np.testing.assert_allclose(sliced.logits, masked.logits, atol=TOLERANCE)
    np.testing.assert_allclose(sliced.taps, np.asarray(masked.taps)[[0, 2], ..., :13], atol=TOLERANCE)
    assert not masked.taps[..., 13:].any() and not masked.hidden[..., 13:].any()
    assert small.num_params == num_params(model.config, subnet, embeddings=True) or len({*subnet.heads}) > 1


def test_a_subnet_without_a_windowed_layer_has_the_rotation_of_the_others():
    model, subnet = tiny_decoder("gemma3"), mlfs.Subnet(24, (4,), (20,), (1,))  # layers 0 and 2 have a window
    batch, small = tiny_tokens(model.config), mlfs.slice_subnet(model, subnet)
    masked = forward(model.graphdef, model.base, batch, mask=mlfs.make_mask(model.config, subnet))
    np.testing.assert_allclose(forward(small.graphdef, small.base, batch).logits, masked.logits, atol=TOLERANCE)
    assert count_flops(small.config.replace(layers=3, windows=(0, 4, 4)), 8) > count_flops(small.config, 8)


@pytest.mark.parametrize("kind", ["llama", "mqa-learned", "olmo2", "bloom", "mla", "phi"])
def test_reordering_leaves_the_function_unchanged(kind):
    model = tiny_decoder(kind)
    batch, lora = tiny_tokens(model.config), random_lora(model)

    def loss(base, batch):
        return (forward(model.graphdef, base, batch).logits ** 2).sum()

    order = importance_order(measure_importance(model, [batch], loss), model.config)
    moved = reorder(model, order)
    before = forward(model.graphdef, model.base, batch, lora=lora)
    after = forward(moved.graphdef, moved.base, batch, lora=reorder_lora(model, lora, order))
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4)
    assert not np.array_equal(order.embed, np.arange(24))
    assert (kind == "bloom") == np.array_equal(order.heads, np.tile(np.arange(4), (3, 1)))
    jax.tree.map(np.testing.assert_array_equal, reorder(moved, order.inverse()).base, model.base)


def test_heads_go_by_whole_groups():
    config = tiny_decoder("llama").config
    assert mlfs.SubnetSpace.from_ratios(config, width=(1.0, 0.4)).heads == (4, 2)
    with pytest.raises(SubnetError, match="multiples of 2"):
        mlfs.make_mask(config, mlfs.Subnet(24, (3,) * 3, (20,) * 3, (0, 1, 2)))
    with pytest.raises(SubnetError, match="multiples of 2"):
        mlfs.SubnetSpace(config, heads=(4, 1), mlp=(20, 10))
    many = tiny_decoder("mqa-learned").config  # the one key-value head stays, query heads go one by one
    assert mlfs.SubnetSpace.from_ratios(many, width=(1.0, 0.75)).heads == (4, 3)


def test_a_norm_over_all_heads_needs_the_same_heads_in_every_layer():
    with pytest.raises(SubnetError, match="same number in every layer"):
        mlfs.slice_subnet(tiny_decoder("olmo2"), SUBNETS[None])


@pytest.mark.parametrize("make", [tiny_decoder, tiny_model], ids=["decoder", "encoder"])
def test_block_influence_is_one_minus_the_cosine(make):
    model = make()
    batch = (tiny_tokens if model.config.head == "lm" else tiny_batch)(model.config)
    out = forward(model.graphdef, model.base, batch, taps=True)
    stream = np.concatenate([out.embedded[None], out.taps])
    real = np.asarray(batch["attention_mask"], bool)
    for layer, found in enumerate(block_influence(model, [batch])):
        a, b = stream[layer][real], stream[layer + 1][real]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(found, 1 - cosine.mean(), atol=1e-5)
    short = {name: x[:1, :3] for name, x in batch.items() if x.ndim == 2}  # every token counts as much as another
    short["attention_mask"] = np.ones((1, 3), np.int32)
    first, other, both = (block_influence(model, batches) for batches in ([batch], [short], [batch, short]))
    np.testing.assert_allclose(both, (first * real.sum() + other * 3) / (real.sum() + 3), rtol=1e-5)


def test_a_language_model_trains_masked_and_sliced_alike_and_learns():
    model = tiny_decoder("llama")
    batch, distill = tiny_tokens(model.config), DistillConfig(feature_dim=6)
    subnets = (mlfs.Subnet(13, (2,) * 2, (7,) * 2, (0, 2)), mlfs.Subnet(24, (2,) * 3, (20,) * 3, (0, 1, 2)))
    after = {}
    for execution in ("masked", "sliced"):
        supernet = Supernet(model.config, distill, optax.adam(1e-2), execution)
        features = init_projection(jax.random.key(3), model.config.embed, distill)
        state, curve = supernet.init({"lora": random_lora(model), "features": features}), []
        for _ in range(12):
            state, losses = supernet.step(state, model.base, batch, subnets, 0.5)
            curve.append(np.asarray(losses))
        after[execution] = curve
    np.testing.assert_allclose(after["masked"][0], after["sliced"][0], rtol=1e-4)
    np.testing.assert_allclose(after["masked"][-1], after["sliced"][-1], rtol=1e-2)
    assert (after["sliced"][-1] < 0.9 * after["sliced"][0]).all()


@pytest.mark.parametrize("execution", ["sliced", "masked"])
def test_a_teachers_kept_targets_change_nothing(execution):
    model = tiny_decoder("llama")
    batch, steps = tiny_tokens(model.config), {}
    subnets = (mlfs.Subnet(13, (2,) * 2, (7,) * 2, (0, 2)), mlfs.Subnet(24, (2,) * 3, (20,) * 3, (0, 1, 2)))
    for keep in (0, 2**20):
        supernet = Supernet(model.config, DistillConfig(beta=0), optax.sgd(0.1), execution, keep_targets=keep)
        steps[keep] = supernet.step(supernet.init({"lora": random_lora(model)}), model.base, batch, subnets, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), steps[0], steps[2**20])
