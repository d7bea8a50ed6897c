"""The forward pass as a pure function: its options change how it runs, never what it computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import BatchEncoding

import mlfs_jax as mlfs
from mlfs_jax.backbone.layers import ACTIVATIONS, gelu
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.config import ACTIVATIONS as NAMES
from mlfs_jax.errors import CheckpointError, ConfigError
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.model import abstract, build, forward, init_model, init_weights
from tests.mlfs.tiny import FAMILIES, random_lora, tiny_batch, tiny_config, tiny_decoder, tiny_lora, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_remat_and_unroll_change_nothing(family):
    model = tiny_model(family)
    batch, lora = tiny_batch(model.config), tiny_lora(model)

    def loss(lora, **how):
        return (forward(model.graphdef, model.base, batch, lora=lora, **how).logits ** 2).sum()

    expected = jax.value_and_grad(loss)(lora)
    for how in ({"remat": True}, {"unroll": True}):
        found = jax.value_and_grad(loss)(lora, **how)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), expected, found)


@pytest.mark.parametrize("make", [tiny_model, partial(tiny_decoder, "llama")])
def test_remat_saves_memory_where_layers_are_unrolled_too(make):
    model = make(layers=6)
    batch, lora = {"input_ids": jnp.ones((8, 16), jnp.int32)}, random_lora(model)

    def temp(**how) -> int:
        loss = lambda lora: (forward(model.graphdef, model.base, batch, lora=lora, **how).logits ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(lora).compile().memory_analysis().temp_size_in_bytes

    assert temp(remat=True, unroll=True) < 0.7 * temp(unroll=True)


def test_outputs_have_the_documented_shapes():
    model = tiny_model(head="token", labels=5)
    out = forward(model.graphdef, model.base, tiny_batch(model.config), taps=True)
    assert (out.logits.shape, out.hidden.shape, out.taps.shape) == ((3, 8, 5), (3, 8, 24), (3, 3, 8, 24))
    np.testing.assert_array_equal(out.taps[-1], out.hidden)
    bare = tiny_model(head="none", labels=0)
    out = forward(bare.graphdef, bare.base, tiny_batch(bare.config))
    assert out.logits is None and out.taps is None


def test_padding_does_not_leak_into_real_tokens():
    model = tiny_model()
    batch = tiny_batch(model.config)
    garbage = batch | {"input_ids": jnp.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    ours, theirs = (forward(model.graphdef, model.base, b).logits for b in (batch, garbage))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_without_a_mask_all_tokens_are_real():
    model = tiny_model()
    batch = tiny_batch(model.config) | {"attention_mask": jnp.ones((3, 8), int)}
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    ours, theirs = (forward(model.graphdef, model.base, b).logits for b in (bare, batch))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_a_tokenizer_gives_is_a_batch():
    """A Mapping of lists, with entries that are not the network's; jax.jit takes neither."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    lists = {name: np.asarray(value).tolist() for name, value in batch.items()} | {"overflowing": ["a", "b", "c"]}
    ours = forward(model.graphdef, model.base, BatchEncoding(lists)).logits
    np.testing.assert_array_equal(ours, forward(model.graphdef, model.base, batch).logits)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([[1, 2]], "batch = list: expected a dict with input_ids"),
        ({"ids": [[1, 2]]}, "batch = one with ids: expected a dict with input_ids"),
        ({"input_ids": [1, 2]}, r"input_ids has shape \(2,\): expected two axes"),
        ({"input_ids": [[1, 2], [3]]}, "pad its texts to one length"),
        ({"input_ids": [[0.5, 2.0]]}, "input_ids are float32: expected whole numbers"),
        ({"input_ids": [[1, 99]]}, "token id 99: expected ids from 0 to 52; is it from another model's tokenizer"),
        ({"input_ids": np.array([[1, -100]])}, "token id -100: expected ids from 0 to 52"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\): expected \(1, 2\)"),
    ],
)
def test_a_batch_that_is_none(batch, message):
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        forward(model.graphdef, model.base, batch)


def test_an_adapter_or_a_mask_of_another_model():
    model = tiny_model()
    run = lambda **how: forward(model.graphdef, model.base, tiny_batch(model.config), **how)  # noqa: E731
    for lora, message in (
        ({"layers.q": {"a": jnp.ones((3, 24, 4))}}, "layers.q has half of a pair, a"),
        ({"head.out": {"bias": jnp.ones(1)}}, r"head.out/bias has shape \(1,\), not \(3,\)"),  # would broadcast
        (tiny_lora(tiny_model(layers=2)), r"layers.* has shape \(2, .* not \(3, "),
    ):
        with pytest.raises(ConfigError, match=f"adapter of another model: {message}"):
            run(lora=lora)
    for changes in ({"embed": 48}, {"heads": 6, "head_dim": 4}, {"mlp": 40}, {"layers": 2}):
        config = tiny_config(**changes)
        with pytest.raises(ConfigError, match=r"mask of another model: mask\..* has shape"):
            run(mask=mlfs.make_mask(config, mlfs.SubnetSpace(config).maxnet))


@pytest.mark.parametrize("dtype", ["int8", "bf16", bool])
def test_a_type_in_which_nothing_is_computed(dtype):
    with pytest.raises(ConfigError, match=r"dtype = .*: expected float32, bfloat16 or float16"):
        tiny_model().astype(dtype)


@pytest.mark.parametrize(
    ("make", "kind", "room"),
    [
        (tiny_model, "bert", 24),
        (tiny_model, "roberta", 22),
        (tiny_decoder, "mqa-learned", 24),
        (tiny_decoder, "opt-350m", 24),
    ],
)
def test_a_text_beyond_the_table_of_positions_is_refused(make, kind, room):
    model = make(kind)
    for length in (room, room + 1):
        batch = {"input_ids": jnp.full((1, length), 5)}
        if length == room:
            assert jnp.isfinite(forward(model.graphdef, model.base, batch).hidden).all()
        else:
            with pytest.raises(ConfigError, match=f"{room + 1} tokens.*positions for {room}"):
                forward(model.graphdef, model.base, batch)


def test_every_activation_that_a_config_may_have_is_built():
    assert set(ACTIVATIONS) == set(NAMES)


def test_gelu_and_its_gradient_are_exact():
    x = jnp.linspace(-6, 6, 101)
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_allclose(gelu(x), exact(x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(exact))(x), atol=1e-6)


def test_new_weights_come_from_the_key_and_only_the_asked_for_are_made():
    config, names = tiny_config(), ("head.out.kernel", "head.out.bias")
    some, same = (init_weights(config, jax.random.key(1), names) for _ in range(2))
    other = init_weights(config, jax.random.key(2), names)
    assert set(some) == set(names)
    np.testing.assert_array_equal(some["head.out.kernel"], same["head.out.kernel"])
    assert abs(some["head.out.kernel"] - other["head.out.kernel"]).max() > 1e-3


def test_every_weight_names_its_axes():
    for family in FAMILIES:
        for name, leaf in flatten(abstract(tiny_config(family))[1]).items():
            assert len(leaf.axes) == len(leaf.shape), name
            assert (leaf.axes[0] == "layers") == name.startswith("layers."), name


def test_build_is_strict():
    config = tiny_config()
    weights = {name: jnp.zeros(leaf.shape) for name, leaf in flatten(abstract(config)[1]).items()}
    assert build(config, weights).num_params == sum(w.size for w in weights.values())
    with pytest.raises(CheckpointError, match=r"missing .*head\.out\.bias"):
        build(config, {k: v for k, v in weights.items() if k != "head.out.bias"})
    with pytest.raises(CheckpointError, match=r"unknown .*head\.extra"):
        build(config, weights | {"head.extra": jnp.zeros(1)})
    with pytest.raises(CheckpointError, match=r"head\.out\.bias has shape \(4,\); this config expects \(3,\)"):
        build(config, weights | {"head.out.bias": jnp.zeros(4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads = 0"),
        ({"embed": 2.5}, r"embed = 2\.5"),
        ({"head": "classifier"}, "head = 'classifier': expected one of none, sequence, token, mlm"),
        ({"labels": 0}, "labels = 0"),
        ({"problem": "ranking"}, "problem = 'ranking'"),
        ({"pooler": True}, "only head 'none'"),
        ({"activation": "nope"}, "activation = 'nope': expected one of gelu,"),
        ({"head_activation": "nope"}, "head_activation = 'nope'"),
    ],
)
def test_configs_refuse_what_cannot_be_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_public_names_are_there():
    for name in mlfs.__all__:
        assert getattr(mlfs, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = mlfs.no_such


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_fingerprint_meets_every_channel(axis):
    """Of a weight whose axes are powers of two, as the step between the numbers that it looks at would be."""
    model = init_model(tiny_config(embed=64, heads=8, head_dim=8, mlp=64, layers=4), 0)

    def without_odd(name, leaf):
        odd = (slice(None),) * axis + (slice(1, None, 2),)
        return leaf[...].at[odd].set(0) if name == "layers.q.kernel" else leaf[...]

    bases = model.base, map_named(without_odd, model.base)
    assert len({base_fingerprint(model.config, base) for base in bases}) == 2
