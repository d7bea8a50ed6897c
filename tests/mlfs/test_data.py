"""Tasks, splits, the user's files, GLUE without TensorFlow, and encoding."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mlfs_jax import registry
from mlfs_jax.data import Examples, encode, eval_batches, get_task, load_task, task_names
from mlfs_jax.data.examples import split_by_hash
from mlfs_jax.data.glue import GLUE
from mlfs_jax.data.tokenizer import load_tokenizer
from mlfs_jax.errors import ConfigError, DataError, DownloadError, UnknownNameError


def examples_of(texts, labels=None, pairs=None) -> Examples:
    return Examples(texts, np.zeros(len(texts), np.int32) if labels is None else np.array(labels), pairs)


# --- splits ---------------------------------------------------------------------------------------------------


def test_split_depends_on_the_text_and_not_on_the_position():
    texts = [f"sentence {i}" for i in range(3000)]
    one = split_by_hash(examples_of(texts))
    two = split_by_hash(examples_of(texts[::-1] + [f"another {i}" for i in range(50)]))
    for split in one:
        assert set(one[split].texts) <= set(two[split].texts)
    shares = {s: len(e) / 3000 for s, e in one.items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.02)


def test_duplicates_are_dropped_and_no_text_is_in_two_splits():
    splits = split_by_hash(examples_of(["a", "b", "a", "a"], [0, 1, 1, 0]))
    found = {t: int(y) for s in splits.values() for t, y in zip(s.texts, s.labels, strict=True)}
    assert found == {"a": 0, "b": 1} and sum(map(len, splits.values())) == 2
    pairs = split_by_hash(examples_of(["p", "p", "p"], pairs=["x", "y", "x"]))
    assert sorted(len(s) for s in pairs.values()) == [0, 0, 2]


# --- the two embedded tasks -----------------------------------------------------------------------------------


def test_wiki_topic():
    task = get_task("wiki-topic")
    splits = task.read()
    assert task.num_labels == 11 and "Uncategorized" not in task.labels and task.metric == "accuracy"
    assert {s: len(e) for s, e in splits.items()} == {"train": 7207, "validation": 874, "test": 952}
    labels = np.concatenate([e.labels for e in splits.values()])
    assert labels.dtype == np.int32 and set(labels) == set(range(11))
    assert np.bincount(labels).max() / len(labels) == pytest.approx(0.202, abs=0.002)


def test_movie():
    task = get_task("movie")
    splits = task.read()
    assert task.labels == ("negative", "positive") and task.num_labels == 2
    assert {s: len(e) for s, e in splits.items()} == {"train": 8031, "validation": 992, "test": 1047}
    for examples in splits.values():  # the file is sorted by sentiment: a split by position would be one-sided
        assert 0.45 < examples.labels.mean() < 0.55
    assert not any("\t" in t or t != t.strip() for t in splits["test"].texts)


def test_unknown_task_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'wiki-topic'"):
        get_task("wiki-topics")
    with pytest.raises(UnknownNameError, match="'glue/sst2'"):
        get_task("sst2")
    with pytest.raises(ConfigError, match="fixed"):
        get_task("movie", problem="regression")
    with pytest.raises(UnknownNameError, match="metric"):
        get_task("movie", metric="acuracy")
    assert get_task("movie", metric="f1", max_length=32).max_length == 32
    with pytest.raises(ConfigError, match=r"'f1', which is of two classes .* wiki-topic has 11: take f1_macro"):
        get_task("wiki-topic", metric="f1")


# --- the user's files -----------------------------------------------------------------------------------------


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def rows_of(n=100, label=lambda i: ["no", "yes"][i % 2], **more):
    return [{"text": f"text number {i}", "label": label(i)} | more for i in range(n)]


def test_jsonl_with_string_labels(tmp_path):
    task = get_task(write(tmp_path / "d.jsonl", jsonl(rows_of())))
    splits = task.read()
    assert (task.problem, task.labels, task.metric) == ("classification", ("no", "yes"), "accuracy")
    assert sum(map(len, splits.values())) == 100
    for e in splits.values():
        assert [int(t.split()[-1]) % 2 for t in e.texts] == e.labels.tolist()


def test_csv_with_pairs_quotes_and_a_byte_order_mark(tmp_path):
    lines = ["text,text_pair,label"] + [f'"one, {i}\nnext line",two é {i},{i % 3}' for i in range(100)]
    task = get_task(write(tmp_path / "d.csv", b"\xef\xbb\xbf" + "\r\n".join(lines).encode()))
    train = task.read()["train"]
    assert task.labels == ("0", "1", "2") and task.num_labels == 3
    assert train.texts[0].startswith("one, ") and "\n" in train.texts[0] and train.pairs[0].startswith("two é")


def test_csv_labels_that_only_look_like_numbers_stay_names(tmp_path):
    names = ("0042", "042", "1_0")
    rows = "".join(f"t{i},{names[i % 3]}\n" for i in range(100))
    assert get_task(write(tmp_path / "d.csv", "text,label\n" + rows)).labels == names
    signs = "".join(f"t{i},{'+-'[i % 2]}1\n" for i in range(100))
    assert get_task(write(tmp_path / "s.csv", "text,label\n" + signs)).labels == ("+1", "-1")
    long = "word " * 30_000  # more than the csv module takes by itself
    rows = "".join(f"{long if i == 7 else i},{i % 2}\n" for i in range(100))
    assert get_task(write(tmp_path / "e.csv", "text,label\n" + rows)).labels == ("0", "1")


def test_fractions_are_scores_to_regress_on(tmp_path):
    task = get_task(write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{i / 4}\n" for i in range(100))))
    assert (task.problem, task.labels, task.metric, task.num_labels) == ("regression", (), "pearson", 1)
    train = task.read()["train"]
    assert train.labels.dtype == np.float32
    assert [float(t[1:]) / 4 for t in train.texts] == train.labels.tolist()
    whole = write(tmp_path / "w.jsonl", jsonl(rows_of(label=lambda i: i % 6)))
    assert get_task(whole, problem="regression").read()["train"].labels.dtype == np.float32
    assert get_task(whole).num_labels == 6


def test_labels_given_by_name_or_by_index(tmp_path):
    named = get_task(write(tmp_path / "a.jsonl", jsonl(rows_of())), labels=["yes", "no", "maybe"])
    assert named.labels == ("yes", "no", "maybe")
    e = named.read()["train"]
    assert [1 - int(t.split()[-1]) % 2 for t in e.texts] == e.labels.tolist()
    indexed = get_task(write(tmp_path / "b.jsonl", jsonl(rows_of(label=lambda i: i % 2))), labels=["no", "yes"])
    e = indexed.read()["train"]
    assert [int(t.split()[-1]) % 2 for t in e.texts] == e.labels.tolist()
    ratings = get_task(write(tmp_path / "c.jsonl", jsonl(rows_of(label=lambda i: i % 5 - 2))))
    assert ratings.labels == ("-2", "-1", "0", "1", "2")


def test_a_folder_with_its_own_splits(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(rows_of(10)))
    with pytest.raises(DataError, match="no train or no validation file"):
        get_task(tmp_path)
    write(tmp_path / "validation.csv", "text,label\nx,yes\ny,no\n")
    splits = get_task(tmp_path).read()
    assert {s: len(e) for s, e in splits.items()} == {"train": 10, "validation": 2}
    assert splits["validation"].labels.tolist() == [1, 0]
    write(tmp_path / "validation.csv", "text,text_pair,label\nx,z,yes\ny,z,no\n")
    with pytest.raises(DataError, match="text_pair is in validation and not in train"):
        get_task(tmp_path)
    write(tmp_path / "test.jsonl", jsonl([*rows_of(2), {"text": "z", "label": "maybe"}]))
    with pytest.raises(DataError, match=r"test\.jsonl, line 3: label 'maybe' is outside the known labels \(no, yes\)"):
        get_task(tmp_path)


def test_whole_numbers_are_names_where_nobody_says_otherwise(tmp_path):
    """Not indices of another split's: 0 is no class of a training split that has 1, 2 and 3."""
    for split, shift in (("train", 1), ("validation", 0)):
        write(tmp_path / f"{split}.jsonl", jsonl(rows_of(9, label=lambda i, shift=shift: i % 3 + shift)))
    with pytest.raises(DataError, match=r"validation\.jsonl, line 1: label 0 is outside the known labels \(1, 2, 3\)"):
        get_task(tmp_path)
    assert get_task(tmp_path, labels=["a", "b", "c", "d"]).read()["validation"].labels.tolist()[:3] == [0, 1, 2]


GOOD = jsonl(rows_of(4))
BAD_FILES = {
    "empty": ("d.jsonl", "", r"line 1: the file is empty"),
    "blank": ("d.csv", " \n\n", r"line 1: the file is empty"),
    "not UTF-8": (
        "d.jsonl",
        GOOD.encode() + b'{"text": "caf\xe9", "label": "no"}\n',
        r"line 5: not UTF-8 \(byte 0xe9\)",
    ),
    "not UTF-8 csv": ("d.csv", b"text,label\na,b\n\xff,c\n", r"line 3: not UTF-8"),
    "bad JSON": ("d.jsonl", GOOD + "{oops}\n", r"line 5: not JSON"),
    "not an object": ("d.jsonl", GOOD + "[1, 2]\n", r"line 5: expected an object"),
    "missing field": ("d.jsonl", GOOD + '{"text": "a"}\n', r"line 5: no field 'label'; it has \['text'\]"),
    "missing text": ("d.jsonl", "\n" + '{"sentence": "a", "label": 1}\n', r"line 2: no field 'text'"),
    "empty text": ("d.jsonl", GOOD + '{"text": " ", "label": "no"}\n', r"line 5: text is ' '"),
    "text no string": ("d.jsonl", GOOD + '{"text": 3, "label": "no"}\n', r"line 5: text is 3"),
    "half a pair": ("d.jsonl", GOOD + '{"text": "a \\ud800 b", "label": "no"}\n', r"line 5: \\ud800 is half of"),
    "label null": ("d.jsonl", GOOD + '{"text": "a", "label": null}\n', r"line 5: label is None"),
    "text null": ("d.jsonl", GOOD + '{"text": null, "label": "no"}\n', r"line 5: text is None"),
    "label a list": ("d.jsonl", GOOD + '{"text": "a", "label": [1]}\n', r"line 5: label is \[1\]"),
    "score nan": ("d.csv", "text,label\na,.5\nb, 1.5\nc,nan\n", r"line 4: label is nan"),
    "label NaN": ("d.jsonl", GOOD + '{"text": "a", "label": NaN}\n', r"line 5: label is nan"),
    "number of 5,000 digits": (
        "d.jsonl",
        GOOD + '{"text": "a", "label": ' + 5000 * "1" + "}\n",
        r"line 5: JSON that cannot be read",
    ),
    "200,000 brackets": ("d.jsonl", GOOD + 200_000 * "[" + "\n", r"line 5: JSON that cannot be read"),
    "score beyond float32": ("d.csv", "text,label\na,.5\nb,1e39\n", r"line 3: label 1e\+39 is beyond"),
    "two columns of a name": ("d.csv", "text,label,label\na,b,c\n", r"line 1: the column 'label' is there 2 times"),
    "mixed labels": ("d.jsonl", GOOD + '{"text": "a", "label": 1}\n', r"line 5: label 1, but line 1 has 'no'"),
    "pairs now and then": ("d.jsonl", GOOD + '{"text": "a", "text_pair": "b", "label": "no"}\n', r"line 5: some rows"),
    "no column": ("d.csv", "text,class\na,b\n", r"line 1: no column label"),
    "too few fields": ("d.csv", "text,label\na,b\nc\n", r"line 3: expected 2 fields"),
    "too many fields": ("d.csv", "text,label\na,b\nc,d,e\n", r"line 3: expected 2 fields"),
    "only a header": ("d.csv", "text,label\n", r"no rows"),
    "single class": ("d.jsonl", jsonl(rows_of(label=lambda i: "same")), r"single class, 'same'"),
    "too few rows": ("d.jsonl", GOOD, r"4 rows are too few to split"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_the_line(tmp_path, case):
    name, content, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message):
        get_task(write(tmp_path / name, content))


def test_labels_outside_the_given_range(tmp_path):
    strings = write(tmp_path / "s.jsonl", jsonl([*rows_of(50), {"text": "odd", "label": "perhaps"}]))
    with pytest.raises(DataError, match=r"line 51: label 'perhaps' is outside the known labels \(no, yes\)"):
        get_task(strings, labels=["no", "yes"])
    numbers = write(tmp_path / "n.jsonl", jsonl([*rows_of(50, label=lambda i: i % 2), {"text": "odd", "label": 2}]))
    with pytest.raises(DataError, match=r"line 51: label 2 is outside 0\.\.1"):
        get_task(numbers, labels=["no", "yes"])
    with pytest.raises(DataError, match=r"line 1: label 'no' is not a number"):
        get_task(strings, problem="regression")
    with pytest.raises(ConfigError, match="two or more"):
        get_task(strings, labels=["no"])
    with pytest.raises(ConfigError, match="leave them out"):
        get_task(strings, labels=["no", "yes"], problem="regression")


def test_missing_and_strange_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        get_task(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"expected one of \.jsonl, \.csv"):
        get_task(write(tmp_path / "d.tsv", "text\tlabel\n"))


# --- GLUE through tensorflow-datasets, without TensorFlow -----------------------------------------------------


def test_glue_sst2(glue_dir):
    task = get_task("glue/sst2", data_dir=glue_dir)
    splits = task.read()
    assert {s: len(e) for s, e in splits.items()} == {"train": 9, "validation": 4}  # test labels are not public
    for e in splits.values():
        assert e.pairs is None and e.labels.dtype == np.int32 and all(isinstance(t, str) for t in e.texts)
        assert [int(t.removeprefix("a film é ")) % 2 for t in e.texts] == e.labels.tolist()


def test_glue_pairs_and_regression(glue_dir):
    task = get_task("glue/stsb", data_dir=glue_dir)
    train = task.read()["train"]
    assert (task.problem, task.num_labels, task.metric) == ("regression", 1, "pearson")
    assert train.labels.dtype == np.float32
    for a, b, y in zip(train.texts, train.pairs, train.labels, strict=True):
        assert a.removeprefix("one ") == b.removeprefix("two ") and float(y) == int(a.split()[1]) * 0.5


def test_glue_mnli_has_two_validation_sets(glue_dir):
    splits = get_task("glue/mnli", data_dir=glue_dir).read()
    assert {s: len(e) for s, e in splits.items()} == {"train": 9, "validation": 3, "validation_mismatched": 4}
    assert all("dev_matched" in t for t in splits["validation"].texts)
    assert [int(t.split()[-1]) % 3 for t in splits["train"].texts] == splits["train"].labels.tolist()


def test_glue_specs_agree_with_the_builder():
    glue = pytest.importorskip("tensorflow_datasets.text.glue")
    configs = {c.name: c for c in glue.Glue.BUILDER_CONFIGS}
    assert len(GLUE) == 9 and set(GLUE) < set(task_names())
    for name, spec in GLUE.items():
        config = configs[name.removeprefix("glue/")]
        assert tuple(config.label_classes or ()) == spec.labels
        assert tuple(config.text_features) == spec.texts


def test_glue_without_network(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(self, url):
        raise ConnectionError("Max retries exceeded\nand more")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    with pytest.raises(DownloadError, match=r"'glue/rte': ConnectionError: .*Max retries exceeded.*Check the network"):
        get_task("glue/rte", data_dir=tmp_path).read()


# --- encoding -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_tiny():
    return registry.fetch("bert-tiny", progress=False)


def test_encoding_equals_transformers(bert_tiny):
    from transformers import AutoTokenizer

    texts = ["A short one.", "naïve café 東京 🙂 don't", "word " * 100, "x"]
    pairs = ["other", "second text here", "more " * 30, "word " * 100]
    oracle = AutoTokenizer.from_pretrained(bert_tiny)
    for second in (None, pairs):
        ours = encode(examples_of(texts, pairs=second), bert_tiny, 40)
        want = oracle(texts, second, truncation=True, max_length=40)
        for i in range(len(texts)):
            part = slice(ours.offsets[i], ours.offsets[i + 1])
            assert ours.ids[part].tolist() == want["input_ids"][i]
            assert ours.types[part].tolist() == want["token_type_ids"][i]
    assert ours.ids.dtype == np.int32 and ours.lengths.max() == 40


def test_a_folder_with_only_a_vocabulary_is_converted(bert_tiny, tmp_path):
    vocab = json.loads((bert_tiny / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)), encoding="utf-8")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert_tiny / name).read_bytes())
    text = "An ordinary sentence, converted."
    assert load_tokenizer(tmp_path).encode(text).ids == load_tokenizer(bert_tiny).encode(text).ids


def test_models_without_token_types_get_none(bert_tiny, tmp_path):
    config = json.loads((bert_tiny / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((bert_tiny / "tokenizer.json").read_bytes())
    changes = {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    encoded = encode(examples_of(["a b c"]), tmp_path, 64)
    assert encoded.types is None and encoded.pad_id == 1
    assert "token_type_ids" not in eval_batches(encoded, 1)[0]
    with pytest.raises(ConfigError, match="65; expected 4 to 64"):
        encode(examples_of(["a b c"]), tmp_path, 65)


def test_a_pair_has_types_where_config_json_leaves_their_number_out(bert_tiny, tmp_path):
    config = json.loads((bert_tiny / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((bert_tiny / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "type_vocab_size"}))
    pair = Examples(["a b"], np.zeros(1, np.int32), ["c d"])
    np.testing.assert_array_equal(encode(pair, tmp_path, 64).types, encode(pair, bert_tiny, 64).types)
    assert set(encode(pair, tmp_path, 64).types) == {0, 1}


def test_a_folder_without_tokenizer(bert_tiny, tmp_path):
    (tmp_path / "config.json").write_bytes((bert_tiny / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no usable tokenizer"):
        encode(examples_of(["a"]), tmp_path, 16)


def test_load_task_with_a_limit(bert_tiny):
    splits = load_task("movie", bert_tiny, limit=50)
    assert {s: len(e) for s, e in splits.items()} == {"train": 50, "validation": 50, "test": 50}
    assert 0.2 < splits["train"].labels.mean() < 0.8  # drawn at random from a file that is sorted
    again = load_task(get_task("movie"), bert_tiny, limit=50)
    assert np.array_equal(splits["train"].ids, again["train"].ids)
    assert load_task("movie", bert_tiny, max_length=8)["test"].lengths.max() == 8


# --- imports --------------------------------------------------------------------------------------------------


def test_encoding_imports_neither_torch_nor_transformers(bert_tiny, glue_dir):
    code = f"""
import sys
from mlfs_jax.data import get_task, load_task
load_task("movie", {str(bert_tiny)!r}, limit=4)
bad = {{"torch", "transformers", "tensorflow", "tensorflow_datasets", "matplotlib"}} & set(sys.modules)
assert not bad, bad
get_task("glue/sst2", data_dir={str(glue_dir)!r}).read()
bad = {{"torch", "transformers", "tensorflow"}} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
