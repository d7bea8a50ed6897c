"""Adapters: neutral at the start, mergeable, summable, small."""

import jax
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.backbone.tree import flatten
from mlfs_jax.errors import ConfigError, UnknownNameError
from mlfs_jax.lora import load_lora, save_lora
from mlfs_jax.model import forward
from tests.mlfs.tiny import tiny_batch, tiny_decoder, tiny_lora, tiny_model


def logits(model, base, batch, lora=None):
    return np.asarray(forward(model.graphdef, base, batch, lora=lora).logits)


def test_fresh_adapter_changes_nothing():
    model = tiny_model()
    batch = tiny_batch(model.config)
    fresh = mlfs.init_lora(jax.random.key(0), model, rank=4, full=("head",))
    np.testing.assert_array_equal(logits(model, model.base, batch, fresh), logits(model, model.base, batch))


def test_no_part_of_an_adapter_is_ignored():
    model = tiny_model("electra")
    batch = tiny_batch(model.config)
    everywhere = [name.removesuffix(".kernel") for name in flatten(model.base) if name.endswith(".kernel")]
    lora = tiny_lora(model, sites=everywhere, full=())
    for site in everywhere:  # each site alone: embed.proj and the head's, too
        alone = {site: lora[site]}
        merged = logits(model, mlfs.merge_lora(model.base, alone), batch)
        np.testing.assert_allclose(logits(model, model.base, batch, alone), merged, atol=1e-4)
        assert abs(merged - logits(model, model.base, batch)).max() > 1e-3, site
    with pytest.raises(ConfigError, match=r"adapter of another model: there is no layers\.gate\.kernel"):
        logits(model, model.base, batch, {"layers.gate": lora["layers.q"]})


def test_a_language_models_head_takes_no_adapter():
    """Its losses read it in the base: a pair there would do nothing, and then be merged."""
    model = tiny_decoder("llama", tied=False)
    for how in ({"sites": ["layers.q", "head"]}, {"full": ("head",)}):
        with pytest.raises(ConfigError, match="head: the head of a language model is frozen"):
            mlfs.init_lora(jax.random.key(0), model, **how)
    pair = {"head": {"a": np.zeros((24, 2)), "b": np.zeros((2, model.config.vocab_size))}}
    with pytest.raises(ConfigError, match="the adapter has a pair at head"):
        mlfs.forward(model.graphdef, model.base, {"input_ids": np.ones((1, 3), np.int32)}, lora=pair)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_merged_equals_adapter_and_unmerge_undoes_it(family):
    model = tiny_model(family)
    batch, lora = tiny_batch(model.config), tiny_lora(model)
    merged = mlfs.merge_lora(model.base, lora)
    adapted = logits(model, model.base, batch, lora)
    assert abs(adapted - logits(model, model.base, batch)).max() > 1e-2  # the adapter is active
    np.testing.assert_allclose(logits(model, merged, batch), adapted, atol=1e-5)
    restored = mlfs.unmerge_lora(merged, lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored, model.base)


def test_stages_stack_to_their_sum():
    model = tiny_model()
    batch, first, second = tiny_batch(model.config), tiny_lora(model, 2), tiny_lora(model, 5, rank=2)
    one_by_one = mlfs.merge_lora(mlfs.merge_lora(model.base, first), second)
    both = mlfs.stack_stages([first, second])
    assert both["layers.q"]["a"].shape[-1] == 5
    np.testing.assert_allclose(logits(model, model.base, batch, both), logits(model, one_by_one, batch), atol=1e-5)


def test_size_is_six_r_d_for_a_square_map_in_three_stages():
    """MLFS, section 3: 2 R D a stage."""
    model = tiny_model(embed=24, heads=4, head_dim=6)
    pair = mlfs.init_lora(jax.random.key(0), model, rank=8, sites=["layers.q"])["layers.q"]
    assert 3 * sum(x.size for x in pair.values()) == 6 * 8 * 24 * model.config.layers


def test_gradient_equals_that_of_the_merged_weights():
    """The hand-written rule of the low-rank product, against autodiff through W + A B."""
    model = tiny_model()
    batch, lora = tiny_batch(model.config), tiny_lora(model)

    def through_merge(lora):
        return (forward(model.graphdef, mlfs.merge_lora(model.base, lora), batch).logits ** 2).sum()

    def through_adapter(lora):
        return (forward(model.graphdef, model.base, batch, lora=lora).logits ** 2).sum()

    expected, found = jax.grad(through_merge)(lora), jax.grad(through_adapter)(lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected, found)


def test_saved_adapter_comes_back_bit_by_bit(tmp_path):
    lora = tiny_lora(tiny_model())
    save_lora(tmp_path / "a.safetensors", lora)
    back = load_lora(tmp_path / "a.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, back, lora)


def test_mistakes_are_named():
    model = tiny_model()
    key = jax.random.key(0)
    with pytest.raises(UnknownNameError, match=r"layers\.qq.*did you mean 'layers\.q'"):
        mlfs.init_lora(key, model, sites=["layers.qq"])
    with pytest.raises(UnknownNameError, match="heads"):
        mlfs.init_lora(key, model, full=("heads",))
    with pytest.raises(ConfigError, match="rank = 0"):
        mlfs.init_lora(key, model, rank=0)
    with pytest.raises(ConfigError, match=r"sites = 'layers\.q': expected several names, such as \('layers\.q',\)"):
        mlfs.init_lora(key, model, sites="layers.q")
    pair = mlfs.init_lora(key, model)["layers.q"]
    for lora, wrong in (
        ({"layers.nope": pair}, r"there is no layers\.nope\.kernel"),
        ({"layers.q": {"a": pair["a"]}}, r"layers\.q has half of a pair, a"),
    ):
        with pytest.raises(ConfigError, match=f"this adapter is of another model: {wrong}"):
            mlfs.merge_lora(model.base, lora)
        with pytest.raises(ConfigError, match=wrong):
            mlfs.slice_subnet(model, mlfs.SubnetSpace(model.config).maxnet, lora=lora)


def test_pairs_start_as_their_own_random_maps():
    """A ~ N(0, 1 / in), no two sites alike; B = 0."""
    lora = mlfs.init_lora(0, tiny_model(embed=256, heads=4, head_dim=64, mlp=256), rank=8)
    assert all(abs(16 * float(lora[f"layers.{site}"]["a"].std()) - 1) < 0.1 for site in ("q", "k", "o", "up", "down"))
    assert abs(lora["layers.q"]["a"] - lora["layers.k"]["a"]).max() > 0.1
    assert not any(np.any(pair["b"]) for pair in lora.values())
