"""Decoding: together and apart compute the same; memories; whose text it is at the gate's ends."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import spa_jax as spa
from mlfs_jax.errors import ConfigError
from mlfs_jax.generate import GenerateConfig
from mlfs_jax.generate import generate as generate_base
from spa_jax.decode import Mailbox, Split, generate
from spa_jax.errors import PluginError
from tests.mlfs.tiny import tiny_decoder
from tests.spa.tiny_side import KINDS, LADDER, PLUGIN, tiny_side

MODEL = tiny_decoder()
SIDES = {kind: tiny_side(MODEL, config) for kind, config in KINDS.items()}
SPARSE = SIDES["ladder"].replace(config=dataclasses.replace(SIDES["ladder"].config, memory="sparse"))
B, T = 2, 6
NINE = GenerateConfig(max_new_tokens=9, stop_tokens=(7,))
PROMPTS = [[5, 9, 11, 30], [17, 3, 8, 25], [40, 41, 42, 43, 44]]


def patterns():
    return st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)


def replay(side, tokens, sigma, setting, first: int) -> np.ndarray:
    """Logits behind each position from ``first`` - 1 on, read one by one after a prompt of ``first`` tokens."""
    split = Split(MODEL, side, B, T, setting=setting)
    real = np.ones_like(tokens, bool)
    logits = [split.read(tokens[:, :first], real[:, :first], sigma[:, :first])]
    logits += [split.read(tokens[:, [t]], real[:, [t]], sigma[:, [t]]) for t in range(first, T)]
    return np.stack(logits, 1)


@settings(max_examples=15)
@given(sigma=patterns(), first=st.integers(1, 4), setting=st.sampled_from(["spa", "s2"]), seed=st.integers(0, 3))
@example(sigma=[[False] * T, [True] * T], first=1, setting="spa", seed=0)
@example(sigma=[[False] * (T - 1) + [True], [True] + [False] * (T - 1)], first=2, setting="spa", seed=0)
def test_lazy_memory_equals_the_dense_pass_for_any_gate_pattern(sigma, first, setting, seed):
    sigma, tokens = np.array(sigma), np.random.default_rng(seed).integers(3, 53, (B, T))
    dense = spa.forward(MODEL.graphdef, MODEL.base, SIDES["ladder"], tokens, setting=setting, sigma=jnp.asarray(sigma))
    lazy = replay(SIDES["ladder"], tokens, sigma, setting, first)
    np.testing.assert_allclose(lazy, dense.logits[:, first - 1 :], atol=1e-4)


@settings(max_examples=8)
@given(sigma=patterns(), first=st.integers(1, 4), kind=st.sampled_from(["sparse", "plugin"]))
def test_sparse_and_stateless_equal_their_pass(sigma, first, kind):
    """Sparse: what the gate kept in the cloud is as if it were not there. Stateless: nothing was."""
    side = SPARSE if kind == "sparse" else SIDES["plugin"]
    sigma, tokens = np.array(sigma), np.random.default_rng(1).integers(3, 53, (B, T))
    whole = spa.forward(MODEL.graphdef, MODEL.base, side, tokens, sigma=jnp.asarray(sigma)).logits
    apart = replay(side, tokens, sigma, "spa", first)
    np.testing.assert_allclose(apart, whole[:, first - 1 :], atol=1e-4)


def test_sparse_memory_forgets_what_it_did_not_see():
    tokens = np.random.default_rng(1).integers(3, 53, (B, T))
    sigma = np.array([[True, False, True, False, False, True]] * B)
    run = lambda side, tokens: spa.forward(  # noqa: E731
        MODEL.graphdef, MODEL.base, side, tokens, sigma=jnp.asarray(sigma)
    ).side_logits[:, -1]
    assert np.abs(run(SPARSE, tokens) - run(SIDES["ladder"], tokens)).max() > 1e-3
    # the pass that trains for it: g of every position from those that were seen, and itself
    cloud = spa.cloud_step(MODEL.graphdef, MODEL.base, {}, None, {"input_ids": tokens}, tapped=SPARSE.tapped)
    g, _ = spa.device_step(SPARSE, None, cloud.frame, seen=jnp.asarray(sigma))
    for t in range(T):
        upto = sigma[:, : t + 1] | (np.arange(t + 1) == t)
        seen = cloud.frame.replace(real=jnp.asarray(np.pad(upto, ((0, 0), (0, T - 1 - t)))))
        np.testing.assert_allclose(spa.device_step(SPARSE, None, seen)[0][:, t], g[:, t], atol=1e-5)


def test_the_ends_of_the_gate_are_the_base_model_and_s1():
    side, base = SIDES["ladder"], generate_base(MODEL, PROMPTS, NINE).tokens
    never = generate(MODEL, side, PROMPTS, NINE, threshold=2.0)
    assert never.tokens == base and never.rates()["usage"] == 0
    always = generate(MODEL, side, PROMPTS, NINE, threshold=0.0)
    s1 = generate(MODEL, side, PROMPTS, NINE, setting="s1")
    assert always.tokens == s1.tokens != base and always.rates()["usage"] == 1


@pytest.mark.parametrize("side", [SIDES["ladder"], SPARSE, SIDES["plugin"]], ids=["lazy", "sparse", "stateless"])
def test_apart_and_together_write_the_same_text(side):
    whole = generate(MODEL, side, PROMPTS, NINE)
    assert 0 < whole.rates()["usage"] < 1
    split = Split(MODEL, side, len(PROMPTS), 32)
    assert split.generate(PROMPTS, NINE) == whole.tokens
    with pytest.raises(ConfigError, match=r"positions read before: expected \d prompts in a fresh Split"):
        split.generate(PROMPTS, NINE)
    used = [sum(row) for row in whole.sigma]
    assert split.round_trips.tolist() == used
    lengths = [len(prompt) + len(row) - 1 for prompt, row in zip(PROMPTS, whole.sigma, strict=True)]
    if side.config.memory == "stateless":
        assert split.sent.tolist() == used
    elif side.config.memory == "lazy":  # everything up to the last token that needed it
        last = [max((i + 1 for i, s in enumerate(row) if s), default=0) for row in whole.sigma]
        expected = [n and len(prompt) + n - 1 for prompt, n in zip(PROMPTS, last, strict=True)]
        assert split.sent.tolist() == expected
    else:
        assert all(sent <= length for sent, length in zip(split.sent, lengths, strict=True))


def test_how_often_the_sides_differ_is_known_where_sparse_memory_sends_nothing():
    """Had a position been sent, and only it: the base's first choice, or another?"""
    found = generate(MODEL, SPARSE, PROMPTS[:1], NINE, threshold=2.0)
    text = np.array([[*PROMPTS[0], *found.tokens[0]]])
    for t, differs in enumerate(found.differs[0]):
        sigma = np.arange(text.shape[1]) == len(PROMPTS[0]) - 1 + t
        out = spa.forward(MODEL.graphdef, MODEL.base, SPARSE, text, sigma=jnp.asarray(sigma[None]))
        ours, theirs = (np.asarray(x)[0, sigma].argmax() for x in (out.side_logits, out.base_logits))
        assert differs == (ours != theirs)
    assert 0 < found.rates()["diff"] < 1 and found.rates()["pick"] == 0


def test_what_does_not_fit_is_refused():
    other = tiny_side(tiny_decoder(embed=32))
    for use in (lambda: generate(MODEL, other, PROMPTS, NINE), lambda: Split(MODEL, other, 1, 32)):
        with pytest.raises(PluginError, match=r"of width 32; the base has .* of width 24"):
            use()
    with pytest.raises(ConfigError, match=r"temperature = 0\.7: .* not sampled"):
        generate(MODEL, SPARSE, PROMPTS, GenerateConfig(temperature=0.7))
    with pytest.raises(ConfigError, match="capacity = 8: expected room for the 9 positions"):
        Split(MODEL, SPARSE, 1, 8).generate(PROMPTS[:1], dataclasses.replace(NINE, stop_tokens=()))


def test_two_users_never_mix():
    """Rows of a batch, in any company and order, write what they write alone."""
    together = generate(MODEL, SIDES["ladder"], PROMPTS, NINE)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(MODEL, SIDES["ladder"], [prompt], NINE)
        assert alone.tokens == [together.tokens[i]] and alone.sigma == [together.sigma[i]]
    # apart, with the steps of two users interleaved on one cloud, each with a plugin of its own
    mine, yours = (Split(MODEL, tiny_side(MODEL, seed=seed), 1, 32) for seed in (0, 5))
    solo = [
        generate(MODEL, split.side, [PROMPTS[i]], GenerateConfig(max_new_tokens=8, stop_tokens=())).tokens[0]
        for i, split in enumerate((mine, yours))
    ]
    read = [np.array([PROMPTS[0]]), np.array([PROMPTS[1]])]
    texts: list[list[int]] = [[], []]
    for _ in range(8):
        for i, split in enumerate((mine, yours)):
            token = int(split.read(read[i], np.ones_like(read[i], bool)).argmax())
            texts[i].append(token)
            read[i] = np.array([[token]])
    assert texts == solo


def test_beams():
    """One beam is greedy; more beams at the gate's end are the base model's."""
    config = dataclasses.replace(NINE, beams=3)
    never = generate(MODEL, SIDES["ladder"], PROMPTS, config, threshold=2.0)
    assert never.tokens == generate_base(MODEL, PROMPTS, config).tokens
    found = generate(MODEL, SIDES["ladder"], PROMPTS, config)
    assert [len(s) for s in found.sigma] == [
        len(new) + bool(end) for new, end in zip(found.tokens, found.finished, strict=True)
    ]


def test_a_mailbox_keeps_what_its_policy_keeps():
    frame = spa.Frame(
        np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4),
        np.array([[0, 1, 2], [0, 0, 1]]),
        np.array([[True, True, True], [False, True, True]]),
    )
    sigma = np.array([[True, False, True], [True, True, False]])
    expected = {"lazy": ([0, 1, 2], [0, 1]), "sparse": ([0, 2], [0]), "stateless": ([2], [1])}
    for memory, positions in expected.items():
        mailbox = Mailbox(memory, 2)
        mailbox.add(frame, sigma)
        assert mailbox.collect(np.array([False, False])) is None
        for b in (0, 1):
            sent = mailbox.collect(np.arange(2) == b)
            real = np.asarray(sent.real)
            assert np.asarray(sent.positions)[real].tolist() == positions[b] and not real[1 - b].any()
        assert mailbox.collect(np.array([True, True])) is None
    assert PLUGIN.memory is None and LADDER.resolve(MODEL.config).memory == "lazy"
