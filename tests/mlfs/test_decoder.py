"""The decoder against itself: the cache against the dense pass, padding, and what each switch must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.backbone.attention import alibi_slopes
from mlfs_jax.errors import ConfigError
from mlfs_jax.model import forward
from tests.mlfs.tiny import DECODERS, tiny_decoder, tiny_model, tiny_tokens


def tokens_and_mask(config, key, lengths, side):
    T = max(lengths)
    ids = jax.random.randint(key, (len(lengths), T), 1, config.vocab_size)
    steps = jnp.arange(T)
    real = jnp.stack([(steps >= T - n) if side == "left" else (steps < n) for n in lengths])
    return {"input_ids": ids, "attention_mask": real.astype(jnp.int32)}


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_equals_the_dense_pass(name):
    """Prefill with left padding, then a few tokens, then a few more."""
    model = tiny_decoder(name)
    batch = tokens_and_mask(model.config, jax.random.key(1), (11, 7), "left")
    dense = forward(model.graphdef, model.base, batch).logits
    cache, found = mlfs.init_cache(model.config, 2, 16), []
    for start, end in ((0, 7), (7, 9), (9, 11)):
        part = {name: x[:, start:end] for name, x in batch.items()}
        out = forward(model.graphdef, model.base, part, cache=cache)
        cache, found = out.cache, [*found, out.logits]
    real = np.asarray(batch["attention_mask"], bool)
    np.testing.assert_allclose(jnp.concatenate(found, 1)[real], dense[real], atol=2e-5)
    assert cache.length.tolist() == [11, 11] and cache.valid.sum(1).tolist() == [11, 7]


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_either_side_changes_nothing(name):
    model = tiny_decoder(name)
    text = tokens_and_mask(model.config, jax.random.key(2), (6,), "left")
    alone = forward(model.graphdef, model.base, {"input_ids": text["input_ids"]}).logits
    for side, at in (("left", slice(3, 9)), ("right", slice(0, 6))):
        before, behind = (3, 0) if side == "left" else (0, 3)
        padded = {name: jnp.pad(x, ((0, 0), (before, behind))) for name, x in text.items()}
        np.testing.assert_allclose(forward(model.graphdef, model.base, padded).logits[:, at], alone, atol=2e-5)


def test_rows_of_a_cache_may_be_of_different_length():
    model = tiny_decoder("llama")
    ids = jax.random.randint(jax.random.key(3), (2, 9), 1, model.config.vocab_size)
    alone = [forward(model.graphdef, model.base, {"input_ids": ids[i : i + 1]}).logits[0, -1] for i in (0, 1)]
    long = forward(model.graphdef, model.base, {"input_ids": ids[:, :8]}, cache=mlfs.init_cache(model.config, 2, 12))
    short = forward(model.graphdef, model.base, {"input_ids": ids[:, :5]}, cache=mlfs.init_cache(model.config, 2, 12))
    pick = lambda a, b: jnp.stack([a[0], b[1]]) if a.ndim < 3 else jnp.stack([a[:, 0], b[:, 1]], 1)  # noqa: E731
    mixed = jax.tree.map(pick, long.cache, short.cache)
    next_ids = jnp.stack([ids[0, 8:], ids[1, 5:6]])
    found = forward(model.graphdef, model.base, {"input_ids": next_ids}, cache=mixed).logits[:, 0]
    np.testing.assert_allclose(found[0], alone[0], atol=2e-5)
    five = forward(model.graphdef, model.base, {"input_ids": ids[1:, :6]}).logits[0, -1]
    np.testing.assert_allclose(found[1], five, atol=2e-5)


def test_a_window_hides_what_lies_further_back():
    model = tiny_decoder("llama")
    model = mlfs.build(
        model.config.replace(windows=(3, 3, 3)), {n: p[...] for n, p in mlfs.flatten(model.base).items()}
    )
    ids = jax.random.randint(jax.random.key(4), (1, 12), 1, model.config.vocab_size)
    run = lambda ids: forward(model.graphdef, model.base, {"input_ids": ids}).logits[0, -1]  # noqa: E731
    same = run(ids.at[0, 5].set((ids[0, 5] + 1) % model.config.vocab_size))  # 3 layers of window 3 see 7 tokens: 5..11
    assert np.abs(run(ids) - same).max() > 1e-6
    np.testing.assert_array_equal(run(ids), run(ids.at[0, 4].set((ids[0, 4] + 1) % model.config.vocab_size)))


def test_taps_and_the_embedded_input_are_the_residual_stream():
    model = tiny_decoder("llama")
    batch = tokens_and_mask(model.config, jax.random.key(5), (5, 5), "left")
    out = forward(model.graphdef, model.base, batch, taps=True)
    assert out.taps.shape == (3, 2, 5, model.config.embed) and out.embedded.shape == (2, 5, model.config.embed)
    without = forward(model.graphdef, model.base, batch, logits=False)
    assert without.logits is None and without.taps is None
    np.testing.assert_allclose(without.hidden, out.hidden, atol=1e-6)


def test_alibi_slopes_of_heads_that_are_no_power_of_two():
    np.testing.assert_allclose(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625])
    np.testing.assert_allclose(alibi_slopes(6)[4:], [0.5, 0.125])  # every second of the series for 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_heads": 3}, "heads = 4, kv_heads = 3"),
        ({"positions": "learned"}, "expected both or neither"),
        ({"alibi_heads": 4}, "alibi_heads = 4"),
        ({"windows": (3,)}, "windows has 1 entries"),
        ({"norm": "batch"}, "norm = 'batch'"),
        ({"parallel": True, "norm_at": "output"}, "only 'pre' is built"),
        ({"activation": "gelu_fast"}, "activation = 'gelu_fast': expected one of gelu,"),
        ({"shared_norm": True}, "shared_norm = True with parallel = False"),
        ({"windows": (4, -1, 0)}, r"windows = \(4, -1, 0\)"),
        ({"rope": mlfs.Rope(1e4, 8)}, "rope dim = 8: expected at most the 6 channels"),
        ({"local_rope": mlfs.Rope(1e4, 4)}, "rope dim = 6, of local_rope 4"),
        ({"latent": mlfs.Latent(8, 8, 4, 2, 4)}, "rope dim = 6: expected at most the 2 channels"),
        (
            {"latent": mlfs.Latent(8, 8, 4, 2, 4), "rope": None, "positions": "learned"},
            "rope = None with Latent",
        ),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change, says):
    with pytest.raises(ConfigError, match=says):
        tiny_decoder("llama").config.replace(**change)


def test_an_encoder_has_no_cache():
    model, cache = tiny_model(), mlfs.init_cache(tiny_decoder("llama").config, 1, 4)
    batch = {"input_ids": jnp.ones((1, 4), int), "attention_mask": jnp.ones((1, 4), int)}
    with pytest.raises(ConfigError, match="encoder has no key-value cache"):
        forward(model.graphdef, model.base, batch, cache=cache)


def test_more_tokens_than_slots():
    model = tiny_decoder()
    with pytest.raises(ConfigError, match="8 tokens, and a cache of 4 slots: make a larger one"):
        forward(model.graphdef, model.base, tiny_tokens(model.config), cache=mlfs.init_cache(model.config, 3, 4))
