"""The central property: masked == sliced == exported, for random subnets of every family."""

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import mlfs_jax as mlfs
from mlfs_jax.hf.export import export_hf
from mlfs_jax.model import forward
from mlfs_jax.subnet import num_params
from tests.mlfs.tiny import FAMILIES, tiny_batch, tiny_lora, tiny_model

TOLERANCE = 1e-4  # fp32 logits


def subnets(config, per_layer: bool):
    """Any subnet at all: not only those that a space offers."""
    layers = st.sets(st.integers(0, config.layers - 1), min_size=1).map(sorted)

    def widths(kept):
        def counts(top):
            one = st.integers(1, top)
            return st.tuples(*[one] * len(kept)) if per_layer else one.map(lambda n: (n,) * len(kept))

        return st.builds(
            mlfs.Subnet,
            st.integers(2, config.embed),  # the norm of a single channel is 0 / 0
            counts(config.heads),
            counts(config.mlp),
            st.just(tuple(kept)),
        )

    return layers.flatmap(widths)


def transformers_logits(folder, batch):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {n: torch.from_numpy(np.array(batch[n], np.int64)) for n in names if n in batch}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_masked_sliced_exported_agree(family, tmp_path_factory):
    model = tiny_model(family)
    batch, lora = tiny_batch(model.config), tiny_lora(model)
    unmasked = np.asarray(forward(model.graphdef, model.base, batch, lora=lora).logits)

    @settings(max_examples=30)
    @given(subnets(model.config, per_layer=True))
    def agree(subnet):
        mask = mlfs.make_mask(model.config, subnet)
        masked = np.asarray(forward(model.graphdef, model.base, batch, lora=lora, mask=mask).logits)
        small = mlfs.slice_subnet(model, subnet, lora=lora)
        sliced = np.asarray(forward(small.graphdef, small.base, batch).logits)
        np.testing.assert_allclose(sliced, masked, atol=TOLERANCE)
        folder = tmp_path_factory.mktemp(family)
        export_hf(small, folder / "hf")
        np.testing.assert_allclose(transformers_logits(folder / "hf", batch), masked, atol=TOLERANCE)
        if subnet != mlfs.SubnetSpace(model.config).maxnet:
            assert abs(masked - unmasked).max() > TOLERANCE  # the mask does something

    agree()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{"head": "token"}, {"head": "mlm", "head_activation": "gelu"}])
def test_other_heads_masked_equals_sliced(family, changes):
    model = tiny_model(family, **changes)
    batch, lora = tiny_batch(model.config), tiny_lora(model)
    subnet = mlfs.Subnet(11, (3, 1), (7, 13), (0, 2))
    masked = forward(model.graphdef, model.base, batch, lora=lora, mask=mlfs.make_mask(model.config, subnet))
    small = mlfs.slice_subnet(model, subnet, lora=lora)
    sliced = forward(small.graphdef, small.base, batch)
    np.testing.assert_allclose(sliced.logits, masked.logits, atol=TOLERANCE)
    np.testing.assert_allclose(sliced.hidden, masked.hidden[..., :11], atol=TOLERANCE)
    assert not masked.hidden[..., 11:].any()


def test_the_maxnet_with_nothing_added_is_the_pretrained_model():
    model = tiny_model()
    batch = tiny_batch(model.config)
    plain = forward(model.graphdef, model.base, batch).logits
    fresh = mlfs.init_lora(jax.random.key(0), model, full=("head",))
    ones = mlfs.make_mask(model.config, mlfs.SubnetSpace(model.config).maxnet)
    np.testing.assert_allclose(
        forward(model.graphdef, model.base, batch, lora=fresh, mask=ones).logits, plain, atol=1e-6
    )


def test_sliced_model_has_the_subnets_size():
    model = tiny_model()
    subnet = mlfs.Subnet(12, (2, 2), (7, 7), (0, 1))
    assert mlfs.slice_subnet(model, subnet).num_params == num_params(model.config, subnet, embeddings=True)


def test_one_compile_for_all_masks_and_vmap_over_subnets():
    model = tiny_model()
    batch, space = tiny_batch(model.config), mlfs.SubnetSpace.from_ratios(model.config, depth=(1, 2 / 3, 1 / 3))
    masks = [mlfs.make_mask(model.config, space.sample(jax.random.key(i))) for i in range(8)]
    run = jax.jit(lambda mask: forward(model.graphdef, model.base, batch, mask=mask).logits)
    each = [run(mask) for mask in masks]
    assert run._cache_size() == 1
    together = jax.vmap(run)(jax.tree.map(lambda *m: np.stack(m), *masks))
    np.testing.assert_allclose(together, np.stack(each), atol=1e-5)


def test_skipped_layers_cost_nothing_to_the_taps():
    model = tiny_model()
    batch = tiny_batch(model.config)
    mask = mlfs.make_mask(model.config, mlfs.Subnet(24, (4, 4), (20, 20), (0, 2)))
    taps = forward(model.graphdef, model.base, batch, mask=mask, taps=True).taps
    np.testing.assert_array_equal(taps[0], taps[1])
    assert abs(taps[2] - taps[1]).max() > 1e-3
