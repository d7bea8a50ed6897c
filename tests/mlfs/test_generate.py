"""Generation: token by token what transformers' ``generate`` gives, few compiles, and no foreign cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.errors import ConfigError, DataError, SessionError, SubnetError
from mlfs_jax.generate import GenerateConfig, Session, bucket, decode, generate, network, pick, stream, warp
from mlfs_jax.hf.export import export_hf
from mlfs_jax.model import forward
from mlfs_jax.slicing import slice_subnet
from tests.mlfs.tiny import random_lora, tiny_decoder, tiny_model

STOPS = (2, 7, 30, 31, 40, 44, 50)  # enough for texts to end early, late and not at all
HALF = mlfs.Subnet(embed=16, heads=(2, 4), mlp=(10, 15), layers=(0, 2))


def random_prompts(seed, longest=15, batch=4):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 53, n).tolist() for n in rng.integers(1, longest + 1, batch)]


# 16 tokens at most, and 16 new ones, 4 texts at a time: one length bucket, so that all tests share few compiles
PROMPTS = random_prompts(0)
TWENTY = random_prompts(1, batch=20)
SHORT = GenerateConfig(max_new_tokens=9, stop_tokens=())


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Each of these programs runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    return tiny_decoder("llama", max_positions=128, eos_token_ids=STOPS)


@pytest.fixture(scope="module")
def lora(model):
    return random_lora(model)


# --- against transformers


@pytest.fixture(scope="module")
def oracle(model, tmp_path_factory):
    """The same network, opened by transformers, and its ``generate`` on left-padded prompts."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_hf(model, folder)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(prompts, stops, **settings):
        """New tokens up to the first stop token, whether there was one, and the scores of a beam search."""
        T = max(map(len, prompts))
        ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
        out = llama.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            eos_token_id=list(stops) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        rows = out.sequences[:, T:].tolist()
        ends = [next((i for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
        finished = [end < len(row) for row, end in zip(rows, ends, strict=True)]
        return [row[:end] for row, end in zip(rows, ends, strict=True)], finished, out.get("sequences_scores")

    return run


def in_fours(model, prompts, config):
    found = [generate(model, prompts[i : i + 4], config) for i in range(0, len(prompts), 4)]
    scores, finished = (np.concatenate(x) for x in zip(*((f.scores, f.finished) for f in found), strict=True))
    return [row for f in found for row in f.tokens], finished.tolist(), scores


def test_greedy_equals_transformers(model, oracle):
    """20 prompts of 1 to 15 tokens, padded on the left."""
    for steps in (16, 1):
        tokens, finished, _ = oracle(TWENTY, STOPS, max_new_tokens=steps)
        assert in_fours(model, TWENTY, GenerateConfig(steps))[:2] == (tokens, finished)
        assert 3 < sum(finished) < 18 or steps == 1


@pytest.mark.parametrize(
    ("penalty", "stops", "steps"),
    [(1.0, STOPS, 16), (3.0, STOPS, 16), (-0.5, STOPS, 13), (0.0, (2,), 12), (1.0, (), 9)],
)
def test_beam_search_equals_transformers(model, oracle, penalty, stops, steps):
    tokens, finished, scores = oracle(TWENTY, stops, max_new_tokens=steps, num_beams=4, length_penalty=penalty)
    config = GenerateConfig(max_new_tokens=steps, beams=4, length_penalty=penalty, stop_tokens=stops)
    found = in_fours(model, TWENTY, config)
    assert found[:2] == (tokens, finished) and (any(finished) or len(stops) < 2)
    np.testing.assert_allclose(found[2], scores, rtol=1e-5)


def test_the_distribution_sampled_from_is_transformers(oracle):
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(0, 2, (4, 53)).astype(np.float32)
    warped = jax.jit(warp)
    for temperature, k, p in (
        (0.7, 0, 1.0),
        (1.0, 5, 1.0),
        (1.5, 0, 0.8),
        (0.8, 11, 0.6),
        (1.0, 99, 0.01),
        (2.0, 1, 1.0),
    ):
        scores = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        scores = scores if k == 0 else process.TopKLogitsWarper(k)(None, scores)
        scores = scores if p == 1 else process.TopPLogitsWarper(p)(None, scores)
        sampling = GenerateConfig(temperature=temperature, top_k=k, top_p=p).sampling
        np.testing.assert_allclose(warped(logits, sampling), scores, rtol=1e-6)
    assert warped._cache_size() == 1


@pytest.fixture
def optimised():
    """Programs as users have them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_a_beam_search_sorts_no_vocabulary(model, optimised):
    """XLA's CPU backend has a kernel for top_k, and falls back to sorting all of it when its pattern is broken."""
    cache = mlfs.init_cache(model.config, 2, 16, jnp.float32)
    sizes = {"limit": jnp.int32(4), "stop": jnp.zeros(53, bool), "length_penalty": jnp.float32(1)}
    lowered = network.decode_beams.lower(
        model.graphdef, model.base, None, None, cache, jnp.ones(2, jnp.int32), beams=4, room=4, **sizes
    )
    program = lowered.compile().as_text()
    assert program.count('custom_call_target="TopK"') == 3 and " sort(" not in program


def test_a_token_is_written_into_the_cache_in_place(model, optimised):
    """No second cache: with its slots a step's own memory grows by at most two layers' keys and values."""
    sizes, spare = {"limit": jnp.int32(4), "stop": jnp.zeros(53, bool), "sampling": None, "key": jax.random.key(0)}, []
    for slots in (256, 512):
        cache = mlfs.init_cache(model.config, 2, slots, jnp.float32)
        arguments = model.graphdef, model.base, None, None, cache, jnp.ones(2, jnp.int32)
        compiled = network.decode_rows.lower(*arguments, room=4, **sizes).compile()
        spare.append(compiled.memory_analysis().temp_size_in_bytes)
    layer = (cache.k.nbytes + cache.v.nbytes) / 2 / model.config.layers  # of the 256 slots more
    assert spare[1] - spare[0] <= 2 * layer


def test_beams_of_a_strong_penalty_write_a_text(model):
    """Divided by a tiny number, scores fall below any that stands for none."""
    found = generate(model, [[5, 6, 7]], GenerateConfig(64, beams=2, length_penalty=-8.0, stop_tokens=()))
    assert len(found.tokens[0]) == 64


def test_an_end_that_the_model_has_no_row_for_ends_nothing():
    model = tiny_decoder("llama", max_positions=128, eos_token_ids=(10**6,))
    assert len(generate(model, [[5, 6, 7]], GenerateConfig(8)).tokens[0]) == 8


# --- sampling


def test_equally_likely_tokens_are_kept_together():
    logits = jnp.array([[0.0, -0.0, 0.0, -1.0, -2.0], [3.0, 3.0, 1.0, 1.0, -jnp.inf]])
    for settings, kept in (
        ({"top_k": 1}, (3, 2)),
        ({"top_p": 0.4}, (3, 2)),
        ({"top_k": 3}, (3, 4)),
        ({"top_k": 4}, (4, 4)),
    ):
        warped = warp(logits, GenerateConfig(temperature=1.0, **settings).sampling)
        assert (warped > -jnp.inf).sum(1).tolist() == list(kept), settings


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.broadcast_to(logits, (4000, 4))
    drawn = jax.jit(pick)(rows, GenerateConfig(temperature=1.0, top_p=0.9).sampling, jax.random.key(0))
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    assert shares[3] == 0
    assert pick(rows, None, jax.random.key(0)).max() == 0
    two = jax.jit(pick)(rows[:2], GenerateConfig(temperature=1.0, top_p=0.9).sampling, jax.random.key(0))
    assert two.tolist() == drawn[:2].tolist(), "a row draws the same beside fewer rows"


def test_sampling_is_decided_by_its_seed(model):
    config = GenerateConfig(max_new_tokens=9, temperature=1.5, top_k=30, top_p=0.95, stop_tokens=())
    first, again, other = (generate(model, PROMPTS, config, key=key) for key in (np.int64(0), jax.random.key(0), 1))
    assert first.tokens == again.tokens != other.tokens
    likeliest = generate(model, PROMPTS, GenerateConfig(9, temperature=1.5, top_k=1, stop_tokens=()))
    assert likeliest.tokens == generate(model, PROMPTS, SHORT).tokens


def test_scores_are_the_models_log_probabilities(model):
    """At whatever temperature the tokens were drawn."""
    for temperature in (0.0, 1.4):
        found = generate(model, PROMPTS, GenerateConfig(9, temperature=temperature, stop_tokens=()))
        whole = [[*prompt, *new] for prompt, new in zip(PROMPTS, found.tokens, strict=True)]
        ids = np.array([[*text, *[0] * (24 - len(text))] for text in whole])
        logprobs = jax.nn.log_softmax(forward(model.graphdef, model.base, {"input_ids": ids}).logits)
        for row, text, prompt, score in zip(np.asarray(logprobs), whole, PROMPTS, found.scores, strict=True):
            expected = sum(row[i - 1, text[i]] for i in range(len(prompt), len(text)))
            np.testing.assert_allclose(score, expected, rtol=1e-4)


# --- compiles


def test_one_compile_for_a_batch_and_a_length_bucket(model, lora):
    programs = (network.prefill, network.decode_rows, network.decode_beams)
    sampled = GenerateConfig(9, temperature=1.0, top_k=3)
    generate(model, PROMPTS, SHORT, subnet=HALF, lora=lora)
    generate(model, PROMPTS, sampled)
    generate(model, PROMPTS, GenerateConfig(9, beams=4))
    before = [program._cache_size() for program in programs]
    smaller = mlfs.Subnet(embed=8, heads=(2,), mlp=(5,), layers=(1,))
    for i, subnet in enumerate((HALF, smaller, mlfs.make_mask(model.config, HALF))):
        prompts, stops = random_prompts(i, longest=4 + 6 * i), tuple(range(i))
        generate(model, prompts, GenerateConfig(1 + 7 * i, stop_tokens=stops), subnet=subnet, lora=lora)
        generate(model, prompts, GenerateConfig(5 + i, temperature=0.5 + i, top_p=0.9), key=jax.random.key(i))
        generate(model, prompts, GenerateConfig(3 + 6 * i, beams=4, length_penalty=0.5 * i, stop_tokens=stops))
    assert [program._cache_size() for program in programs] == before
    assert [bucket(n) for n in (0, 1, 16, 17, 33, 1000)] == [0, 16, 16, 32, 64, 1024]


# --- subnets, adapters


def test_every_subnet_generates_from_the_same_weights(model, lora):
    """masked == sliced, adapter and all."""
    masked = generate(model, PROMPTS, SHORT, subnet=HALF, lora=lora)
    sliced = slice_subnet(model, HALF, lora=lora)
    assert masked.tokens == generate(sliced, PROMPTS, SHORT).tokens != generate(model, PROMPTS, SHORT).tokens


def test_padding_changes_nothing(model):
    together, width = generate(model, PROMPTS, SHORT).tokens, max(map(len, PROMPTS)) + 2
    for left in (True, False):
        pad = lambda row, fill: [*fill, *row] if left else [*row, *fill]  # noqa: B023, E731
        ids = [pad(p, [9] * (width - len(p))) for p in PROMPTS]
        mask = [pad([1] * len(p), [0] * (width - len(p))) for p in PROMPTS]
        batch = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
        assert generate(model, batch, SHORT).tokens == together


# --- streams and sessions


def test_a_stream_gives_the_tokens_of_generate(model):
    """Of a row beside others, too, and it compiles one step."""
    for config in (GenerateConfig(16), GenerateConfig(12, temperature=1.3, top_k=20)):
        sizes = []
        for seed in range(5):
            prompts = [PROMPTS[0], *random_prompts(seed)[1:]]
            found = generate(model, prompts, config, key=seed)
            assert list(stream(model, prompts[0], config, key=seed)) == found.tokens[0]
            sizes.append(network.decode_token._cache_size())
        assert len(set(sizes)) == 1


def test_a_session_goes_on_where_the_text_ended(model):
    """Three turns with a session == each turn with all the text before it; the cache grows when it must."""
    session, texts, ended = Session(), [[], [], [], []], 0
    for turn, config in enumerate((GenerateConfig(4, beams=4), GenerateConfig(4), GenerateConfig(4))):
        prompts = random_prompts(turn, longest=2)
        texts = [[*text, *prompt] for text, prompt in zip(texts, prompts, strict=True)]
        found, whole = generate(model, prompts, config, session=session), generate(model, texts, config)
        assert found.tokens == whole.tokens
        np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-4)
        texts = [[*text, *new] for text, new in zip(texts, found.tokens, strict=True)]
        for text, unread, finished in zip(texts, session.unread, found.finished, strict=True):
            if finished:
                text.append(unread[-1])  # the stop token is part of the text
        ended += found.finished[:].sum() * (turn < 2)
    assert 0 < ended < 8
    assert session.cache.valid.sum(1).tolist() == session.lengths == [len(text) - 1 for text in texts]
    assert session.cache.capacity == 64


def test_a_session_goes_on_from_where_the_reader_stopped(model):
    session, prompt = Session(), PROMPTS[0]
    read = stream(model, prompt, SHORT, session=session)
    start = [next(read) for _ in range(4)]
    rest = list(stream(model, [], GenerateConfig(5, stop_tokens=()), session=session))
    assert [*start, *rest] == list(stream(model, prompt, SHORT))


def test_a_session_refuses_another_network(model, lora):
    session = Session()
    generate(model, PROMPTS, GenerateConfig(3), subnet=HALF, lora=lora, session=session)
    other = tiny_decoder("llama", seed=1, max_positions=128)
    narrower = mlfs.Subnet(embed=16, heads=(2, 4), mlp=(10, 14), layers=(0, 2))
    doubled = {site: {**entry, "b": 2 * entry["b"]} for site, entry in lora.items()}
    for what, model_, settings in (
        ("subnet", model, {"subnet": narrower, "lora": lora}),
        ("subnet", model, {"lora": lora}),
        ("adapter", model, {"subnet": HALF, "lora": doubled}),
        ("adapter", model, {"subnet": HALF}),
        ("model", other, {"subnet": HALF, "lora": lora}),
    ):
        with pytest.raises(SessionError, match=f"filled by another {what}: .*new Session"):
            generate(model_, PROMPTS, SHORT, session=session, **settings)
    with pytest.raises(SessionError, match="2 prompts for a session of 4 texts"):
        generate(model, PROMPTS[:2], SHORT, subnet=HALF, lora=lora, session=session)
    copy = jax.tree.map(jnp.copy, lora)  # another object, the same adapter
    mask = mlfs.make_mask(model.config, HALF)
    assert generate(model, [[]] * 4, SHORT, subnet=mask, lora=copy, session=session).tokens


# --- the loop, over something that is no network


def test_decoding_works_over_any_step_function():
    """A network that counts: token t is followed by t + 1; what it was asked is in its state."""

    def step(state, tokens, alive):
        seen, asked = state
        return jax.nn.one_hot(tokens + 1, 20), (seen.at[:, asked].set(jnp.where(alive, tokens, -1)), asked + 1)

    state = (jnp.full((3, 8), -2), jnp.int32(0))
    stop = jnp.arange(20) == 9
    settings = {"room": 8, "limit": jnp.int32(7), "stop": stop, "key": jax.random.key(0)}
    rows, out = decode(step, state, jnp.array([7, 5, 8]), **settings)
    assert out.tolist() == [[8, 9, *[-1] * 6], [6, 7, 8, 9, *[-1] * 4], [9, *[-1] * 7]]
    assert rows.count == 4, "it stops when all rows have ended"
    assert rows.done.all() and rows.last.tolist() == [9, 9, 9]
    seen, _ = rows.state
    assert seen.tolist() == [[7, 8, -1, -1, *[-2] * 4], [5, 6, 7, 8, *[-2] * 4], [8, -1, -1, -1, *[-2] * 4]]


def test_a_stream_whose_session_went_on_elsewhere_says_so(model):
    session = Session()
    reading = stream(model, [5, 6, 7], GenerateConfig(8, stop_tokens=()), session=session)
    next(reading)
    generate(model, [[8]], GenerateConfig(2, stop_tokens=()), session=session)
    with pytest.raises(SessionError, match="went on elsewhere"):
        next(reading)


# --- mistakes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected a whole number of at least 1"),
        ({"beams": 0}, "beams = 0: expected"),
        ({"beams": 1.5}, "beams = 1.5: expected"),
        ({"temperature": -1.0}, "temperature = -1.0: expected 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1e-40}, r"temperature = 1e-40: expected 0 \(no sampling\), or 1e-30"),
        ({"temperature": 1.0, "top_p": 1e-40}, "top_p = 1e-40: expected a probability"),
        ({"temperature": 1.0, "top_k": 2**31}, r"top_k = 2147483648: .*below 2\^31"),
        ({"beams": True}, "beams = True: expected a whole number"),
        ({"stop_tokens": 2}, r"stop_tokens = 2: expected ids, such as \(2,\)"),
        ({"temperature": 1.0, "top_k": -1}, "top_k = -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0: expected a probability"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": 0.9}, "set a temperature"),
        ({"top_k": 9}, "set a temperature"),
        ({"temperature": 1.0, "beams": 4}, "set one of them"),
        ({"length_penalty": 2.0}, "set beams, too"),
        ({"beams": 2, "length_penalty": float("inf")}, "expected a number from -8 to 8"),
    ],
)
def test_a_setting_that_cannot_be_says_why(change, says):
    with pytest.raises(ConfigError, match=says):
        GenerateConfig(**change)


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        ([], ConfigError, "no prompts"),
        ([[3], []], ConfigError, "prompt 1 of 2 is empty"),
        ([[3, 53]], ConfigError, r"tokens \[53\]: expected ids from 0 to 52"),
        ([[3] * 130], ConfigError, "130 tokens; the context of model is 128, .*: cut it to 127"),
        ([[3] * 120], ConfigError, "120 tokens, and max_new_tokens = 9 .*set max_new_tokens to 8 at most"),
        (["text"], DataError, "see generate_text"),
        (["12"], DataError, "see generate_text"),  # not the tokens 1 and 2
        ([[1.5]], DataError, "expected a list of token ids"),
        ({"input_ids": [3, 4]}, DataError, r"input_ids \(2,\), .*expected the same two axes"),
        ([3, 4], DataError, "expected a list of token ids for each"),
    ],
)
def test_a_prompt_that_cannot_be_continued_says_why(model, prompts, error, says):
    with pytest.raises(error, match=says):
        generate(model, prompts, SHORT)


def test_a_model_that_cannot_generate_says_why(model):
    with pytest.raises(ConfigError, match=r"is an encoder \(bert\)"):
        generate(tiny_model(), [[3]])
    with pytest.raises(ConfigError, match="load it with head='lm'"):
        generate(tiny_decoder("llama", head="none"), [[3]])
    with pytest.raises(SubnetError, match="does not fit"):
        generate(model, [[3]], subnet=mlfs.Subnet(99, (4,), (20,), (0,)))
    with pytest.raises(ConfigError, match=r"stop_tokens has \[53\]"):
        generate(model, [[3]], GenerateConfig(stop_tokens=(53,)))
    with pytest.raises(ConfigError, match="use generate"):
        stream(model, [3], GenerateConfig(beams=2))
