"""A base in 8 or 4 bits: what its weights become, that a forward pass and its gradients are those of these weights,
and what it saves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.backbone.quantised import NF4, Quantised, dequantised
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.export import export_hf
from mlfs_jax.hf.gguf_tokenizer import PRE_TOKENIZERS
from mlfs_jax.hf.gguf_write import export_gguf
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.sharding import make_mesh, sharding_of
from mlfs_jax.supernet import TrainState
from tests.mlfs.gguf_files import byte_level_tokenizer
from tests.mlfs.tiny import tiny_decoder, tiny_model, tiny_tokens

PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
"""NF4 as QLoRA's appendix E lists it."""


def kernels(model):
    return {name: leaf for name, leaf in mlfs.flatten(model.base).items() if name.startswith("layers.")}


def test_the_levels_are_the_published_ones():
    np.testing.assert_allclose(NF4, [float(x) for x in PUBLISHED.split()], atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_to_the_nearest_level_of_their_group(bits):
    model = tiny_decoder()
    levels = NF4 if bits == 4 else np.arange(-127, 128) / 127
    was = mlfs.flatten(model.base)
    for name, leaf in mlfs.flatten(model.quantise(bits).base).items():
        old = np.asarray(was[name][...])
        if not (name.startswith("layers.") and name.endswith(".kernel")):
            np.testing.assert_array_equal(leaf[...], old)
            continue
        assert isinstance(leaf.get_value(), Quantised)
        assert (leaf.shape, leaf.ndim, leaf.size) == (old.shape, old.ndim, old.size)
        rows = int(np.prod(old.shape[1 : 1 + leaf.inputs]))  # 20 and 24: one group
        grouped = old.reshape(len(old), 1, rows, -1)
        scale = np.abs(grouped).max(2, keepdims=True)
        nearest = levels[np.abs(grouped[..., None] / scale[..., None] - levels).argmin(-1)] * scale
        np.testing.assert_allclose(np.asarray(leaf[...]).ravel(), nearest.ravel(), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [tiny_model, tiny_decoder])
def test_a_forward_pass_and_its_gradients_are_those_of_the_rounded_weights(make, bits):
    quantised = make().quantise(bits)
    plain = dequantised(quantised.base)
    tokens, key = tiny_tokens(quantised.config), jax.random.key(1)
    lora = mlfs.init_lora(key, quantised, rank=2)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), lora)

    def loss(lora, base):
        return (mlfs.forward(quantised.graphdef, base, tokens, lora=lora).hidden ** 2).mean()

    for theirs, ours in zip(
        jax.tree.leaves(jax.value_and_grad(loss)(lora, plain)),
        jax.tree.leaves(jax.value_and_grad(loss)(lora, quantised.base)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    merged = mlfs.merge_lora(quantised.base, lora)
    a = mlfs.forward(quantised.graphdef, merged, tokens).hidden
    np.testing.assert_allclose(
        a, mlfs.forward(quantised.graphdef, quantised.base, tokens, lora=lora).hidden, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("bits", "share"), [(8, 0.27), (4, 0.15)])
def test_a_training_step_holds_one_layers_weights_at_a_time(bits, share):
    config = dataclasses.replace(tiny_decoder().config, embed=256, mlp=1024, layers=8, vocab_size=64)
    model = mlfs.init_model(config, jax.random.key(0))
    tokens, lora = tiny_tokens(config), mlfs.init_lora(jax.random.key(0), model, rank=2)
    floats = sum(leaf.nbytes for name, leaf in kernels(model).items() if name.endswith(".kernel"))

    def step(state, base):
        loss = lambda lora: mlfs.forward(model.graphdef, base, tokens, lora=lora).logits.var()  # noqa: E731
        grads = jax.grad(loss)(state.params)
        return TrainState(jax.tree.map(jnp.subtract, state.params, grads), state.opt_state, state.step + 1)

    def memory(model):
        state = TrainState(lora, (), jnp.zeros((), jnp.int32))
        return jax.jit(step).lower(state, model.base).compile().memory_analysis()

    plain, quantised = memory(model), memory(model.quantise(bits))
    saved = plain.argument_size_in_bytes - quantised.argument_size_in_bytes
    assert saved >= (1 - share) * floats
    assert quantised.temp_size_in_bytes - plain.temp_size_in_bytes <= 2.5 * floats / config.layers


def test_in_another_type_and_twice():
    model = tiny_decoder().quantise(4)
    assert model.quantise(4).base is model.base
    for bits in (8, 32):
        with pytest.raises(ConfigError, match=f"base_bits = {bits}: this base is in 4 bits already"):
            model.quantise(bits)
    half = model.astype(jnp.bfloat16)
    assert mlfs.flatten(half.base)["layers.q.kernel"][...].dtype == jnp.bfloat16
    out = mlfs.forward(half.graphdef, half.base, tiny_tokens(model.config))
    assert out.hidden.dtype == jnp.bfloat16 and np.isfinite(out.logits).all()
    assert half.num_params == tiny_decoder().num_params


@pytest.mark.parametrize("mlp", [1, 33, 67, 131, 1021])
def test_any_number_of_inputs_is_filled_up_to_groups(mlp):
    """And never takes more than floats would."""
    model = tiny_decoder(mlp=mlp)
    plain = mlfs.flatten(model.base)["layers.down.kernel"][...]
    for bits, error in ((8, 0.005), (4, 0.16)):
        kernel = mlfs.flatten(model.quantise(bits).base)["layers.down.kernel"].get_value()
        assert kernel.bits == bits and kernel.shape == plain.shape
        assert np.abs(kernel[...] - plain).max() <= error * np.abs(plain).max()
        assert kernel.codes.nbytes + kernel.scale.nbytes <= (0.4 if mlp > 1 else 2) * plain.nbytes


def test_importance_is_that_of_the_rounded_weights():
    model = tiny_decoder().quantise(4)
    batches, found = [tiny_tokens(model.config)], []
    for base in (model.base, dequantised(model.base)):
        loss = lambda base, batch: mlfs.forward(model.graphdef, base, batch).logits.var()  # noqa: E731
        found.append(mlfs.measure_importance(model.replace(base=base), batches, loss))
    np.testing.assert_allclose(found[0].mlp, found[1].mlp, rtol=1e-5)


def test_what_cannot_be():
    model = tiny_decoder()
    with pytest.raises(ConfigError, match="base_bits = 5: expected 4, 8 or 32"):
        model.quantise(5)
    kernel = kernels(model.quantise(8))["layers.q.kernel"].get_value()
    with pytest.raises(TypeError, match=r"no \[0\]: expected \[\.\.\.\]"):
        kernel[0]
    mesh = mlfs.make_mesh("data=1")
    with pytest.raises(ConfigError, match="a quantised base lies on one device"):
        mlfs.shard_base(mesh, model.quantise(8).base)
    with pytest.raises(ConfigError, match="base_bits = 8: a base on a mesh is not quantised"):
        model.replace(base=mlfs.shard_base(mesh, model.base)).quantise(8)


@pytest.mark.parametrize("gguf", [False, True])
def test_a_base_may_be_rounded_as_it_is_loaded(gguf, tmp_path):
    folder = tmp_path / "model"
    if gguf:
        folder.mkdir()
        source = byte_level_tokenizer(tmp_path / "words", PRE_TOKENIZERS["smollm"])
        export_gguf(tiny_decoder("llama", vocab_size=405, embed=32).replace(source=source), folder / "m.gguf", "f32")
    else:
        export_hf(tiny_decoder(), folder)
    after, before = from_pretrained(folder).quantise(4), from_pretrained(folder, base_bits=4)
    assert isinstance(kernels(before)["layers.q.kernel"].get_value(), Quantised)
    jax.tree.map(np.testing.assert_array_equal, after.base, before.base)
    with pytest.raises(ConfigError, match="base_bits = 5: expected 4, 8 or 32"):
        from_pretrained(folder, base_bits=5)
    with pytest.raises(ConfigError, match="a base on a mesh is not quantised here"):
        from_pretrained(folder, base_bits=8, sharding=partial(sharding_of, make_mesh("data=1")))
