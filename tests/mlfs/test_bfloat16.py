"""A network computes in the type of its base: a frozen bfloat16 base beside float32 adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlfs_jax as mlfs
from mlfs_jax.data.encode import Encoded
from mlfs_jax.distill import DistillConfig, init_projection
from mlfs_jax.evaluate import evaluate, predict
from mlfs_jax.model import forward
from mlfs_jax.supernet import Supernet
from tests.mlfs.tiny import (
    DECODERS,
    FAMILIES,
    random_lora,
    tiny_batch,
    tiny_decoder,
    tiny_lora,
    tiny_model,
    tiny_tokens,
)


def cases():
    for kind in DECODERS:
        yield pytest.param(lambda k=kind: with_inputs(tiny_decoder(k), random_lora, tiny_tokens), id=kind)
    for family in FAMILIES:
        yield pytest.param(lambda f=family: with_inputs(tiny_model(f), tiny_lora, tiny_batch), id=family)


def with_inputs(model, make_lora, make_batch):
    heads, mlp = (2, 2, 2), (13, 13, 13)
    mask = mlfs.make_mask(model.config, mlfs.Subnet(17, heads, mlp, (0, 1, 2)))
    return model, make_lora(model), mask, make_batch(model.config)


def products(jaxpr):
    """The operand types of every matrix product, loops and branches included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(x.aval.dtype) for x in eqn.invars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("make", list(cases()))
def test_every_product_is_in_the_type_of_the_base(make):
    model, lora, mask, batch = make()
    half = model.astype(jnp.bfloat16)
    run = lambda base: forward(model.graphdef, base, batch, lora=lora, mask=mask, taps=True)  # noqa: E731
    kinds = set(products(jax.make_jaxpr(run)(half.base).jaxpr))
    assert kinds == {("bfloat16", "bfloat16")}
    ours, rounded = run(half.base), run(half.astype(jnp.float32).base)  # the same rounded weights, exact products
    assert ours.hidden.dtype == ours.taps.dtype == jnp.bfloat16
    error = jnp.linalg.norm(ours.hidden.astype(jnp.float32) - rounded.hidden) / jnp.linalg.norm(rounded.hidden)
    assert error < 0.1  # the random weights here amplify what rounding does in each layer
    if model.config.head == "lm":
        assert ours.logits.dtype == jnp.float32


@pytest.mark.parametrize("make", [lambda: tiny_decoder("llama"), tiny_model], ids=["decoder", "encoder"])
@pytest.mark.parametrize("execution", ["masked", "sliced"])
def test_a_step_on_a_bfloat16_base_moves_float32_adapters_the_same_way(make, execution):
    model = make()
    lm = model.config.head == "lm"
    lora, batch = (
        (random_lora(model), tiny_tokens(model.config)) if lm else (tiny_lora(model), tiny_batch(model.config))
    )
    subnets = (mlfs.Subnet(17, (2, 2), (13, 13), (0, 2)),)
    distill = DistillConfig(feature_dim=6)
    supernet = Supernet(model.config, distill, optax.sgd(0.1), execution)

    def moved(base):
        params = {"lora": lora, "features": init_projection(jax.random.key(0), model.config.embed, distill)}
        before = jax.tree.map(np.asarray, params)
        state, losses = supernet.step(supernet.init(params), base, batch, subnets, 0.0)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params)) and losses.dtype == jnp.float32
        change = jax.tree.map(lambda a, b: (np.asarray(a) - b).ravel(), state.params, before)
        return np.concatenate(jax.tree.leaves(change)), np.asarray(losses)

    half = model.astype(jnp.bfloat16)
    (change, losses), (exact, expected) = moved(half.base), moved(half.astype(jnp.float32).base)
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert change @ exact / np.linalg.norm(change) / np.linalg.norm(exact) > 0.99


def test_a_bfloat16_classifier_is_evaluated_in_float32():
    model, rng, n = tiny_model(labels=2), np.random.default_rng(0), 2000
    ids, offsets = rng.integers(4, model.config.vocab_size, 4 * n), np.arange(n + 1) * 4
    encoded = Encoded(ids.astype(np.int32), None, offsets, rng.integers(0, 2, n).astype(np.int32), 0, 4)
    half = model.astype(jnp.bfloat16)
    scores = [evaluate(m, encoded, "accuracy", batch_size=500) for m in (half, half.astype(jnp.float32))]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=0.02)
    assert predict(half, encoded.subset(4))[0].dtype == np.float32


@pytest.mark.parametrize(
    ("make", "make_lora", "inputs"),
    [(lambda: tiny_decoder("llama"), random_lora, tiny_tokens), (tiny_model, tiny_lora, tiny_batch)],
    ids=["decoder", "encoder"],
)
def test_merging_a_float32_adapter_keeps_the_type_of_the_base(make, make_lora, inputs):
    half = make().astype(jnp.bfloat16)
    merged = mlfs.merge_lora(half.base, make_lora(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.isfinite(forward(half.graphdef, merged, inputs(half.config)).logits).all()
