"""The side network: its shape, its start, what it reads, and that it knows nothing of the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import BatchEncoding

import spa_jax as spa
from mlfs_jax.errors import ConfigError, UnknownNameError
from mlfs_jax.importance import Importance
from spa_jax.errors import PluginError
from spa_jax.model import cloud_step
from spa_jax.seam import Frame
from spa_jax.side import abstract_net, block_config, device_step, init_side_cache
from spa_jax.start import best_units
from tests.mlfs.tiny import tiny_decoder, tiny_tokens
from tests.spa.tiny_side import KINDS, LADDER, PLUGIN, tiny_side

SMOLLM2 = {"vocab_size": 49152, "embed": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp": 1536}


def random_importance(config, seed=0) -> Importance:
    rng = np.random.default_rng(seed)
    L = config.layers
    shapes = ((config.embed,), (L, config.heads), (L, config.mlp), (L,))
    return Importance(*(rng.random(shape) for shape in shapes))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt-350m", "glm", "mla"])
def test_a_ladder_stands_beside_every_family(family):
    model = tiny_decoder(family)
    heads = 2 if model.config.kv_group == 2 else 1
    side = tiny_side(model, dataclasses.replace(LADDER, heads=heads))
    batch = tiny_tokens(model.config)
    out = spa.forward(model.graphdef, model.base, side, batch, setting="s1")
    assert out.logits.shape == (3, 8, model.config.vocab_size)
    assert np.isfinite(out.logits[np.asarray(batch["attention_mask"], bool)]).all()
    axes = spa.side_axes(side.config, side.backbone)
    assert {name: len(a) for name, a in axes.items()} == {name: x.ndim for name, x in side.net.items()}


def test_alpha_weighs_the_ladder_against_its_rungs():
    """h = mu h + (1 - mu) tap with mu = sigmoid(alpha / 0.1): at 1 no rung counts, at -1 the last alone."""
    model = tiny_decoder()
    side = tiny_side(model, dataclasses.replace(LADDER, every=1))
    frame = cloud_step(model.graphdef, model.base, {}, None, tiny_tokens(model.config), tapped=side.tapped).frame
    for alpha, counts in ((1.0, [True, False, False, False]), (-1.0, [False, False, False, True])):
        net = side.net | {"alpha": jnp.full_like(side.net["alpha"], alpha)}
        run = lambda taps, net=net: device_step(side.replace(net=net), None, frame.replace(taps=taps))[0]  # noqa: E731
        g = run(frame.taps)
        moved = [float(jnp.abs(run(frame.taps.at[i].mul(-1)) - g).max() / jnp.abs(g).max()) for i in range(4)]
        assert [change > 0.05 for change in moved] == counts and min(moved) < 0.005, moved


@pytest.mark.parametrize("kind", ["plugin", "plugin-parallel"])
def test_plugins_by_hand(kind):
    model = tiny_decoder()
    side = tiny_side(model, KINDS[kind])
    frame = cloud_step(model.graphdef, model.base, {}, None, tiny_tokens(model.config), tapped=side.tapped).frame
    net, relu = {name: np.asarray(x) for name, x in side.net.items()}, lambda x: np.maximum(x, 0)

    def adapter(h, layer):
        for i in (1, 2):
            inner = h if i == 1 else relu(inner)
            inner = inner @ net[f"layers.wide{i}.kernel"][layer] + net[f"layers.wide{i}.bias"][layer]
        return h + inner

    down = np.einsum("nbtD,nDd->nbtd", frame.taps, net["down.kernel"]) + net["down.bias"][:, None, None]
    h = down[0]
    for layer, tap in enumerate(down[1:]):
        parallel = kind == "plugin-parallel"
        h = h + adapter(relu(tap), layer) if parallel else tap + adapter(relu(h), layer)
    g, _ = device_step(side, None, frame)
    np.testing.assert_allclose(g, relu(h) @ net["up.kernel"] + net["up.bias"], atol=1e-4)


def test_a_side_of_another_depth_is_refused():
    deep, shallow = tiny_decoder(layers=6), tiny_decoder(layers=2)
    for model, other in ((shallow, deep), (deep, shallow)):
        with pytest.raises(PluginError, match=r"was made for a base of \d layers; this has \d"):
            spa.forward(model.graphdef, model.base, tiny_side(other), tiny_tokens(model.config))
    batch = tiny_tokens(shallow.config)
    with pytest.raises(PluginError, match=r"tapped layers \(1, 3, 5\): expected ones below 2"):
        cloud_step(shallow.graphdef, shallow.base, {}, None, batch, tapped=(1, 3, 5))


def test_blocks_see_as_far_as_the_layers_they_stand_beside():
    config = tiny_decoder("gemma2").config
    assert config.windows == (4, 0, 4)
    assert block_config(dataclasses.replace(LADDER, every=1).resolve(config), config).windows == (4, 0, 4)
    wide = config.replace(layers=4, windows=(4, 0, 4, 0))
    assert block_config(LADDER.resolve(wide), wide).windows == (0, 0)


def test_padding_behind_a_chunk_takes_no_slot():
    model = tiny_decoder()
    side, batch = tiny_side(model), tiny_tokens(model.config, batch=2, length=7)
    batch["attention_mask"] = jnp.ones_like(batch["attention_mask"])
    frame = cloud_step(model.graphdef, model.base, {}, None, batch, tapped=side.tapped).frame
    whole, _ = device_step(side, None, frame)

    def part(begin, end):
        return Frame(frame.taps[:, :, begin:end], frame.positions[:, begin:end], frame.real[:, begin:end])

    first = part(0, 6)
    first = first.replace(real=first.real & (jnp.arange(6) < 4))  # the last two of the chunk are filling
    g, cache = device_step(side, init_side_cache(side, 2, 16), first)
    np.testing.assert_allclose(g[:, :4], whole[:, :4], atol=1e-5)
    assert cache.length.tolist() == [4, 4]
    g, _ = device_step(side, cache, part(4, 7))
    np.testing.assert_allclose(g, whole[:, 4:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_and_blind_to_padding(kind):
    """What comes later, and padding on either side, changes nothing before it."""
    model = tiny_decoder()
    side, tokens = tiny_side(model, KINDS[kind]), np.random.default_rng(0).integers(3, 53, (2, 7))

    def run(ids, mask):
        batch = {"input_ids": ids, "attention_mask": mask}
        return spa.forward(model.graphdef, model.base, side, batch, setting="s1").logits

    whole = run(tokens, np.ones_like(tokens))
    padding = np.zeros((2, 3), int)
    ids, mask = np.concatenate([padding, tokens[:, :5]], 1), np.concatenate([padding, np.ones((2, 5), int)], 1)
    np.testing.assert_allclose(run(ids, mask)[:, 3:], whole[:, :5], atol=2e-5)
    ids, mask = np.concatenate([tokens[:, :5], padding], 1), np.concatenate([np.ones((2, 5), int), padding], 1)
    np.testing.assert_allclose(run(ids, mask)[:, :5], whole[:, :5], atol=2e-5)


def test_the_first_logits_are_the_base_models_where_g_is_added():
    model = tiny_decoder()
    for kind in (LADDER, PLUGIN):
        side = spa.init_side(jax.random.key(0), model.config, kind)
        out = spa.forward(model.graphdef, model.base, side, tiny_tokens(model.config), setting="s1")
        np.testing.assert_array_equal(out.logits, out.base_logits)
    alone = spa.init_side(jax.random.key(0), model.config, LADDER, setting="s3")
    out = spa.forward(model.graphdef, model.base, alone, tiny_tokens(model.config), setting="s3")
    assert float(jnp.abs(out.logits).max()) > 0.01 and not alone.gate


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_net_has_no_weak_types(kind):
    """A weak type becomes a strong one in the first update, and the step compiles anew."""
    side = spa.init_side(jax.random.key(0), tiny_decoder().config, KINDS[kind])
    assert not [name for name, x in side.net.items() if jnp.asarray(x).weak_type]


def test_ids_alone_or_what_a_tokenizer_gives():
    model = tiny_decoder()
    side = spa.init_side(jax.random.key(0), model.config, LADDER)
    ids, mask = [[3, 4, 5], [0, 6, 7]], [[1, 1, 1], [0, 1, 1]]
    run = lambda tokens: spa.forward(model.graphdef, model.base, side, tokens).logits  # noqa: E731
    whole = run(BatchEncoding({"input_ids": ids, "attention_mask": mask}))
    np.testing.assert_array_equal(whole, run({"input_ids": jnp.array(ids), "attention_mask": jnp.array(mask)}))
    np.testing.assert_allclose(whole[:1], run(ids[:1]), atol=1e-5)
    with pytest.raises(ConfigError, match=r"shape \(3,\): expected two axes"):
        run(ids[0])


def test_settings():
    model, f_only = tiny_decoder(), {}
    side, batch = tiny_side(model), tiny_tokens(model.config)
    for setting in spa.Setting:
        out = spa.forward(model.graphdef, model.base, side, batch, setting=setting)
        gated = setting in ("s2", "spa")
        assert bool(out.sigma.all()) != gated or not gated
        expected = np.where(out.sigma[..., None], out.side_logits, out.base_logits)
        np.testing.assert_allclose(out.logits, expected, atol=1e-5)
        f_only[setting] = out.base_logits
        if setting.adds:  # the head is linear: logits of f + g are the sum of both
            alone = spa.forward(model.graphdef, model.base, side, batch, setting="s3").logits
            np.testing.assert_allclose(out.side_logits, out.base_logits + alone, atol=1e-4)
    out = spa.forward(model.graphdef, model.base, side, batch, setting="spa", threshold=2.0)
    np.testing.assert_array_equal(out.logits, out.base_logits)
    always = spa.forward(model.graphdef, model.base, side, batch, setting="spa", threshold=0.0)
    s1 = spa.forward(model.graphdef, model.base, side, batch, setting="s1")
    np.testing.assert_array_equal(always.logits, s1.logits)
    with pytest.raises(UnknownNameError, match="s1"):
        spa.forward(model.graphdef, model.base, side, batch, setting="s11")


def test_every_weight_of_the_side_learns_and_the_base_has_no_gradient():
    model, batch = tiny_decoder(), tiny_tokens(tiny_decoder().config)
    for kind in KINDS.values():
        side = tiny_side(model, kind)

        def loss(net, side=side):
            out = spa.forward(model.graphdef, model.base, side.replace(net=net), batch, setting="s1")
            return (jax.nn.log_softmax(out.logits)[..., 5] * batch["loss_mask"]).sum()

        grads = jax.grad(loss)(side.net)
        still = [name for name, g in grads.items() if not np.abs(g).max() > 0]
        assert not still


@pytest.mark.parametrize("family", ["llama", "bloom", "mla"])
def test_a_sliced_start_is_the_backbones_best_part(family):
    model = tiny_decoder(family)
    importance = random_importance(model.config)
    heads = 2 if model.config.kv_group == 2 else 1
    config = dataclasses.replace(LADDER, heads=heads).resolve(model.config)
    side = spa.init_side(jax.random.key(0), model.config, config, model=model, importance=importance)
    random = jax.eval_shape(lambda: spa.init_side(jax.random.key(0), model.config, config))
    assert {name: x.shape for name, x in side.net.items()} == {name: x.shape for name, x in random.net.items()}
    keep = best_units(config, model.config, importance)
    layer, embed = keep["layers"][1], keep["embed"]
    up = np.asarray(model.base["layers"]["up"]["kernel"][...])
    np.testing.assert_array_equal(side.net["layers.up.kernel"][1], up[layer][np.ix_(embed, keep["mlp"][1])])
    assert not np.any(side.net["up.kernel"])
    alone = spa.init_side(0, model.config, config, setting="s3", model=model, importance=importance)
    np.testing.assert_array_equal(alone.net["up.kernel"], alone.net["down.kernel"][-1].T)  # channels go back
    o = np.asarray(model.base["layers"]["o"]["kernel"][...])
    np.testing.assert_array_equal(side.net["layers.o.kernel"][1], o[layer][keep["heads"][1]][:, :, embed])
    assert {*embed} == {*np.argsort(-importance.embed)[: config.width]}
    if "layers.k.kernel" in side.net:
        group = model.config.heads // model.config.kv_heads
        assert {h // group for h in keep["heads"][1]} == {*keep["kv_heads"][1]}


@pytest.mark.parametrize("heads, kv_heads, chosen", [(40, 10, 4), (36, 12, 3), (60, 10, 6), (9, 3, 1), (64, 8, 8)])
def test_the_default_has_heads_that_fit(heads, kv_heads, chosen):
    config = spa.SideConfig().resolve(tiny_decoder(heads=heads, kv_heads=kv_heads).config)
    assert config.heads == chosen


def test_a_slice_of_one_head_of_a_group():
    model = tiny_decoder(heads=6, kv_heads=2)
    config = dataclasses.replace(LADDER, heads=1).resolve(model.config)
    blocks = block_config(config, model.config)
    assert (blocks.heads, blocks.kv_heads) == (1, 1)
    importance = random_importance(model.config)
    keep = best_units(config, model.config, importance)
    for row, layer in enumerate(keep["layers"]):
        groups = importance.heads[layer].reshape(2, 3)
        best = groups.sum(-1).argmax()
        assert keep["kv_heads"][row] == [best] and keep["heads"][row] == [3 * best + groups[best].argmax()]


def test_sizes_for_smollm2():
    """d 72 at every third layer: a plugin file of less than 5 MB in fp32."""
    backbone = dataclasses.replace(tiny_decoder().config, **SMOLLM2)
    for config in (spa.SideConfig(), spa.SideConfig(ladder="plugin")):
        config = config.resolve(backbone)
        shapes = jax.eval_shape(lambda c=config: spa.init_side(jax.random.key(0), backbone, c))
        assert shapes.num_params * 4 < 5e6
        assert shapes.tapped == tuple(range(2, 30, 3))
    assert spa.SideConfig().resolve(backbone).width == 72 and spa.SideConfig().resolve(backbone).heads == 1


def test_the_released_plugins_share_of_llama_7b():
    """About 0.2 % new parameters (SPA, section 5), with a block for every layer."""
    backbone = dataclasses.replace(tiny_decoder().config, embed=4096, layers=32, heads=32, kv_heads=32, head_dim=128)
    config = spa.SideConfig(ladder="plugin", every=1).resolve(backbone)
    size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_net(config, backbone)[1]))
    assert 0.0017 < size / 6.7e9 < 0.0022


def test_what_does_not_fit_is_refused():
    model = tiny_decoder()
    for message, changes in {
        r"width = 24: expected less than 24": {"width": 24},
        r"every = 4: expected at most 3": {"every": 4},
        r"heads = 3: expected at most 4, in whole groups of 2": {"heads": 3},
        r"heads = 6": {"heads": 6},
        r"width = 0": {"width": 0},
        r"ladder = 'rope'": {"ladder": "rope"},
        r"a plugin is stateless": {"ladder": "plugin", "memory": "lazy", "heads": None},
        r"'lazy' or 'sparse'": {"memory": "stateless"},
        r"a plugin has no attention": {"ladder": "plugin"},
        r"order = 'both'": {"order": "both"},
    }.items():
        with pytest.raises(ConfigError, match=message):
            spa.init_side(jax.random.key(0), model.config, dataclasses.replace(LADDER, **changes))
    importance = random_importance(model.config)
    with pytest.raises(ConfigError, match="a sliced start is for ladders"):
        spa.init_side(jax.random.key(0), model.config, PLUGIN, model=model, importance=importance)
    with pytest.raises(ConfigError, match="both the model and its importance"):
        spa.init_side(jax.random.key(0), model.config, LADDER, model=model)
