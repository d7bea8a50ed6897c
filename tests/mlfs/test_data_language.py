"""Language tasks: their splits, blocks of text, prompts and completions, what of a batch counts in the loss."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfs_jax.data import (
    Batches,
    Examples,
    Task,
    encode_lm,
    encode_seq2seq,
    eval_batches,
    fingerprint,
    get_task,
    load_task,
    prompt_batches,
    specials,
)
from mlfs_jax.data.examples import text_hash
from mlfs_jax.data.tokenizer import load_tokenizer, positions
from mlfs_jax.errors import ConfigError, DataError, UnknownNameError

TEXTS = [
    "A lead is the first paragraph of an article, and says what it is about.",
    "naïve café 東京 🙂 don't\n\nA second paragraph.",
    "Short description: one that looks like the template's own words.",
    "x",
] * 6
END, BEGIN, UNUSED = "<end>", "<begin>", "<unused>"


def write_tokenizer(folder, *, begin=False, spaced=False, **config):
    """A model folder with a byte-level BPE tokenizer of 400 tokens, or one that marks words with ▁ (Llama 2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=spaced, unk_token=UNUSED if spaced else None))
    alphabet = []
    if spaced:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, BEGIN, UNUSED], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "max_position_embeddings": 256, "eos_token_id": 0} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_begin(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("begin"), begin=True, pad_token_id=2)


def row(encoded, i):
    return encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]].tolist()


def seq2seq_examples(n=24, tail="\n\nShort description:"):
    texts = [f"{i}. {TEXTS[i % len(TEXTS)]}" for i in range(n)]
    return Examples(
        texts, tails=None if tail is None else [tail] * n, completions=[f" number {i}, described" for i in range(n)]
    )


# --- tasks ----------------------------------------------------------------------------------------------------


def test_wiki_tasks():
    lm, described, topic = (get_task(name) for name in ("wiki-lm", "wiki-description", "wiki-topic"))
    assert (lm.problem, lm.metric, lm.num_labels, lm.labels) == ("lm", "perplexity", 0, ())
    assert (described.problem, described.metric, described.num_labels) == ("seq2seq", "rougeL", 0)
    splits = lm.read()
    assert {s: len(e) for s, e in splits.items()} == {"train": 7995, "validation": 982, "test": 1056}
    pairs = described.read()
    assert {s: len(e) for s, e in pairs.items()} == {"train": 7855, "validation": 964, "test": 1043}
    for split, examples in splits.items():  # an article is in the same split for every task
        assert set(pairs[split].texts) <= set(examples.texts)
        assert set(topic.read()[split].texts) <= set(examples.texts)
        assert examples.labels is None and len(set(examples.texts)) == len(examples)
    test = pairs["test"]
    assert set(test.tails) == {"\n\nShort description:"} and described.template == "{text}\n\nShort description:"
    assert all(c[0] == " " and c[1:] == c.strip() != "" for c in test.completions)


@pytest.mark.parametrize(("language", "rows"), [("es", 5854), ("fr", 9643)])
def test_wiki_descriptions_in_other_languages(language, rows):
    splits = get_task(f"wiki-description-{language}").read()
    assert sum(map(len, splits.values())) == rows
    assert len(splits["train"]) / rows == pytest.approx(0.8, abs=0.02)
    texts = [set(e.texts) for e in splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_metrics_that_do_not_fit_the_problem():
    assert get_task("wiki-description", metric="perplexity").metric == "perplexity"
    with pytest.raises(ConfigError, match="metric is 'rougeL'; a lm task is measured by one of perplexity"):
        get_task("wiki-lm", metric="rougeL")
    with pytest.raises(ConfigError, match="metric is 'perplexity'; a classification task is measured by one of acc"):
        get_task("movie", metric="perplexity")
    with pytest.raises(ConfigError, match="fixed"):
        get_task("wiki-lm", problem="seq2seq")
    with pytest.raises(UnknownNameError, match="did you mean 'wiki-description-es'"):
        get_task("wiki-description-e")


# --- special tokens -------------------------------------------------------------------------------------------


def test_special_tokens(model, with_begin, tmp_path):
    assert specials(model) == ((), 0, 0)  # no pad token: the end-of-text token fills up
    assert specials(with_begin) == ((1,), 0, 2)
    several = write_tokenizer(tmp_path / "several", eos_token_id=[2, 0], pad_token_id=None)
    assert specials(several) == ((), 2, 2)
    silent = write_tokenizer(tmp_path / "silent", eos_token_id=None)
    with pytest.raises(ConfigError, match=r"names no end-of-text token.*causal language model"):
        specials(silent)
    (silent / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": UNUSED}}))
    assert specials(silent).eos == 2


def test_a_token_that_the_model_has_no_row_for(model, tmp_path):
    shutil.copytree(model, tmp_path / "small")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 3}))
    with pytest.raises(DataError, match=r"has the id \d+, and the model 3 rows"):
        encode_lm(Examples(TEXTS), tmp_path / "small", 8)


def test_positions_by_their_names():
    assert positions({"max_position_embeddings": 2048}) == 2048
    assert positions({"model_type": "gpt2", "n_positions": 1024}) == 1024
    assert positions({"model_type": "bloom", "seq_length": 4096}) == 4096
    assert positions({"model_type": "bloom"}) == 2048
    assert positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512


def test_a_folder_without_config(tmp_path):
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        encode_lm(Examples(TEXTS), tmp_path, 8)


# --- running text ---------------------------------------------------------------------------------------------


@given(length=st.integers(4, 60), n=st.integers(1, 12))
def test_blocks_put_together_are_the_text(model, length, n):
    tokenizer = load_tokenizer(model)
    stream = [t for text in TEXTS[:n] for t in [*tokenizer.encode(text).ids, 0]]
    kept = encode_lm(Examples(TEXTS[:n]), model, length)
    rest = len(stream) % length
    assert kept.ids.tolist() == stream[: len(stream) - (rest == 1)]  # of one token nothing is to be predicted
    assert kept.lengths[:-1].tolist() == [length] * (len(kept) - 1) and 2 <= kept.lengths[-1] <= length
    if len(stream) >= length:
        whole = encode_lm(Examples(TEXTS[:n]), model, length, whole_blocks=True)
        assert set(whole.lengths) == {length} and whole.ids.tolist() == stream[: len(stream) - rest]
    assert kept.labels is None and kept.starts.tolist() == [1] * len(kept)


def test_each_text_begins_as_the_tokenizer_begins_it(with_begin, tmp_path):
    encoded = encode_lm(Examples(["x", "x"]), with_begin, 16)
    assert row(encoded, 0)[0] == 1 and row(encoded, 0).count(1) == 2 and row(encoded, 0).count(0) == 2
    same = write_tokenizer(tmp_path / "same", begin=True, eos_token_id=1)  # OPT's
    assert row(encode_lm(Examples(["x", "x"]), same, 16), 0).count(1) == 2


def test_too_little_text(model):
    with pytest.raises(DataError, match=r"1 texts have 2 tokens together, too few for a block of 16"):
        encode_lm(Examples(["x"]), model, 16, whole_blocks=True)
    with pytest.raises(ConfigError, match="max_length is 257; expected 4 to 256"):
        encode_lm(Examples(TEXTS), model, 257)


# --- prompts and completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_an_example_is_prompt_completion_end(tmp_path, spaced, begin):
    folder = write_tokenizer(tmp_path / "m", spaced=spaced, begin=begin)
    tokenizer, examples = load_tokenizer(folder), seq2seq_examples(6)
    encoded = encode_seq2seq(examples, folder, 256, 100)
    for i, (text, tail, completion) in enumerate(
        zip(examples.texts, examples.tails, examples.completions, strict=True)
    ):
        assert row(encoded, i) == [*tokenizer.encode(text + tail + completion).ids, 0]
        assert row(encoded, i)[: encoded.starts[i]] == tokenizer.encode(text + tail).ids
    assert encoded.references[3] == "number 3, described" and encoded.max_completion == 100
    assert encoded.starts.dtype == encoded.ids.dtype == np.int32


def test_a_token_may_not_span_prompt_and_completion(model):
    together = encode_seq2seq(Examples(["abou"], tails=["a"], completions=["t it"]), model, 64, 16)
    tokenizer = load_tokenizer(model)
    prompt = Examples(["an art"], completions=["icle about"])
    assert (
        tokenizer.encode("an article about").ids[: len(tokenizer.encode("an art").ids)]
        != tokenizer.encode("an art").ids
    )
    encoded = encode_seq2seq(prompt, model, 64, 16)
    assert row(encoded, 0)[: encoded.starts[0]] == tokenizer.encode("an art").ids
    assert tokenizer.decode(row(encoded, 0)[encoded.starts[0] :]) == "icle about"
    assert together.starts[0] == len(tokenizer.encode("aboua").ids)


@given(room=st.integers(16, 60))
def test_a_long_prompt_loses_the_end_of_its_text(model, room):
    tokenizer = load_tokenizer(model)
    text, tail = " ".join(TEXTS[:3]), "\n\nShort description:"
    encoded = encode_seq2seq(Examples([text], tails=[tail], completions=[" yes"]), model, room + 8, 8)
    prompt = tokenizer.decode(row(encoded, 0)[: encoded.starts[0]])
    assert prompt.endswith(tail) and text.startswith(prompt.removesuffix(tail)) and len(prompt) > len(tail)
    whole = len(tokenizer.encode(text + tail).ids)
    assert min(room, whole) - 4 <= encoded.starts[0] <= room  # an emoji of 4 tokens goes or stays
    assert row(encoded, 0)[: encoded.starts[0]] == tokenizer.encode(prompt).ids
    assert tokenizer.decode(row(encoded, 0)[encoded.starts[0] :]) == " yes"


def test_a_long_prompt_without_a_tail_loses_its_beginning(model):
    text = " ".join(TEXTS[:3])
    encoded = encode_seq2seq(Examples([text], completions=[" yes"]), model, 40, 8)
    prompt = load_tokenizer(model).decode(row(encoded, 0)[: encoded.starts[0]])
    assert text.endswith(prompt) and 28 <= encoded.starts[0] <= 32


def test_the_prompt_does_not_depend_on_the_completion(model):
    text, tails = [" ".join(TEXTS[:3])] * 2, ["\n\nShort description:"] * 2
    encoded = encode_seq2seq(Examples(text, tails=tails, completions=[" a", " much longer " * 9]), model, 64, 16)
    assert row(encoded, 0)[: encoded.starts[0]] == row(encoded, 1)[: encoded.starts[1]]
    assert row(encoded, 0)[-1] == 0
    assert len(row(encoded, 1)) == encoded.starts[1] + 16 and row(encoded, 1)[-1] != 0  # cut: it does not end
    assert encoded.references[1] == ("much longer  " * 9).strip()
    halved = encode_seq2seq(Examples(text, tails=tails, completions=[" a", " b " * 50]), model, 64, 60)
    assert halved.max_completion == 32


def test_prompts_that_cannot_be_cut_or_are_nothing(model):
    with pytest.raises(ConfigError, match=r"leaves 2 tokens for a prompt, and its end .* alone has"):
        encode_seq2seq(seq2seq_examples(3), model, 4, 2)
    with pytest.raises(DataError, match="the prompt '' is no token"):
        encode_seq2seq(Examples([""], completions=[" a"]), model, 16, 8)


# --- batches --------------------------------------------------------------------------------------------------


def test_the_loss_counts_completions_and_ends(model):
    encoded = encode_seq2seq(seq2seq_examples(), model, 96, 24)
    batches = Batches(encoded, 4, seed=1)
    for step in range(batches.epoch_steps):
        batch = batches[step]
        assert set(batch) == {"input_ids", "attention_mask", "loss_mask"}
        assert batch["loss_mask"].dtype == np.float32 and batch["loss_mask"].shape == batch["input_ids"].shape
        for r, i in enumerate(batches.rows(step)):
            counted = batch["input_ids"][r][batch["loss_mask"][r] == 1]
            assert counted.tolist() == row(encoded, i)[encoded.starts[i] :]
            assert np.flatnonzero(batch["loss_mask"][r])[0] == encoded.starts[i]
            assert not np.any(batch["loss_mask"][r] > batch["attention_mask"][r])
        again = Batches(encoded, 4, seed=1)[step]
        assert all(np.array_equal(again[key], value) for key, value in batch.items())


def test_the_loss_of_running_text_counts_all_but_the_first(model):
    encoded = encode_lm(Examples(TEXTS), model, 32)
    total = 0
    for batch in eval_batches(encoded, 5):
        want = batch["attention_mask"].astype(np.float32)
        want[:, 0] = 0
        assert np.array_equal(batch["loss_mask"], want * batch["weight"][:, None])
        total += batch["loss_mask"].sum()
    assert total == len(encoded.ids) - len(encoded)


@given(batch_size=st.integers(1, 9), n=st.integers(1, 24))
def test_prompts_are_filled_up_on_the_left(model, batch_size, n):
    examples = seq2seq_examples(n)
    encoded = encode_seq2seq(examples, model, 96, 24)
    tokenizer, seen = load_tokenizer(model), []
    for batch, references in prompt_batches(encoded, batch_size):
        assert set(batch) == {"input_ids", "attention_mask", "weight"} and len(batch["input_ids"]) == batch_size
        assert batch["weight"].tolist() == [1.0] * len(references) + [0.0] * (batch_size - len(references))
        assert (np.diff(batch["attention_mask"], axis=1) >= 0).all() and batch["attention_mask"][:, -1].all()
        for ids, mask, reference in zip(batch["input_ids"], batch["attention_mask"], references, strict=False):
            i = encoded.references.index(reference)
            seen.append(i)
            assert ids[mask == 1].tolist() == row(encoded, i)[: encoded.starts[i]]
            assert tokenizer.decode(ids[mask == 1].tolist()).endswith("Short description:")
    assert sorted(seen) == list(range(n))


def test_running_text_has_no_prompts(model):
    with pytest.raises(ConfigError, match="no prompts to continue"):
        prompt_batches(encode_lm(Examples(TEXTS), model, 32), 4)


def test_subset_and_user_keep_the_columns_together(model):
    examples = seq2seq_examples()
    examples = Examples(
        examples.texts,
        tails=examples.tails,
        completions=examples.completions,
        users=[("ann", "bob")[int(text_hash(t)) % 2] for t in examples.texts],
    )
    encoded = encode_seq2seq(examples, model, 96, 24)
    for part in (encoded.subset(7), encoded.of_user("ann")):
        for i, reference in enumerate(part.references):
            j = encoded.references.index(reference)
            assert row(part, i) == row(encoded, j) and part.starts[i] == encoded.starts[j]
            assert part.users[i] == encoded.users[j] == examples.users[j]
    assert len(encoded.of_user("ann")) + len(encoded.of_user("bob")) == 24
    assert examples.of_user("bob").completions == [
        c for c, u in zip(examples.completions, examples.users, strict=True) if u == "bob"
    ]
    with pytest.raises(UnknownNameError, match="unknown user 'anna': did you mean 'ann'"):
        encoded.of_user("anna")
    with pytest.raises(UnknownNameError, match="Known: none"):
        encode_seq2seq(seq2seq_examples(3), model, 96, 24).of_user("ann")


def test_fingerprint_sees_tokens_labels_and_prompt_lengths(model):
    data = {"train": encode_seq2seq(seq2seq_examples(), model, 96, 24)}
    assert fingerprint(data) == fingerprint(dict(data)) != fingerprint({"train": data["train"].subset(23)})
    moved = encode_seq2seq(seq2seq_examples(), model, 96, 24)
    moved.starts[0] -= 1
    assert fingerprint({"train": moved}) != fingerprint(data)


def test_load_task(model):
    splits = load_task("wiki-description", model, max_length=64, limit=8)
    assert {s: len(e) for s, e in splits.items()} == {"train": 8, "validation": 8, "test": 8}
    assert splits["test"].max_completion == 32 and splits["test"].lengths.max() <= 64
    texts = {"train": Examples(TEXTS), "validation": Examples(TEXTS[:5])}
    task = Task("text", lambda: texts, "lm", (), "perplexity", 17)
    blocks = load_task(task, model)
    assert set(blocks["train"].lengths) == {17} and blocks["validation"].lengths[-1] < 17
    assert [len(e) for e in load_task(task, model, limit=3).values()] == [3, 3]
