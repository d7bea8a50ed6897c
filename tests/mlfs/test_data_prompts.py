"""Prompts and texts that come from elsewhere: dialogues, the user's own files, XSum and its like as array_record."""

import importlib.util
import json
import sys
import types

import pytest

from mlfs_jax.data import get_task, task_names
from mlfs_jax.data.examples import text_hash
from mlfs_jax.data.prompted_sets import PROMPTED_SETS, read_prompted
from mlfs_jax.errors import ConfigError, DataError, DownloadError, UnknownNameError
from tests.prepared import RECORDS, SIZES


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def prompts(n=100, **more):
    return [{"prompt": f"question {i}?", "completion": f"answer {i}"} | more for i in range(n)]


# --- dialogues ------------------------------------------------------------------------------------------------


def test_dialogues():
    task = get_task("dialogues")
    splits = task.read()
    assert (task.problem, task.metric, task.template) == ("seq2seq", "rougeL", "{text}\n\nReply:")
    assert sum(map(len, splits.values())) == 1176 and min(map(len, splits.values())) > 100
    texts = [set(e.texts) for e in splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    everything = {(t, c) for e in splits.values() for t, c in zip(e.texts, e.completions, strict=True)}
    assert ("Who was the 37th President of the United States?", " Richard Nixon") in everything
    assert all(t == t.strip() != "" and c[1:] == c.strip() != "" for t, c in everything)


# --- the user's files -----------------------------------------------------------------------------------------


def test_texts_as_jsonl(tmp_path):
    task = get_task(write(tmp_path / "d.jsonl", jsonl({"text": f"text {i}"} for i in range(100))))
    splits = task.read()
    assert (task.problem, task.metric, task.labels, task.num_labels) == ("lm", "perplexity", (), 0)
    assert sum(map(len, splits.values())) == 100 and splits["train"].labels is None
    labelled = write(tmp_path / "l.jsonl", jsonl({"text": f"text {i}", "label": i % 2} for i in range(100)))
    assert get_task(labelled).problem == "classification" and get_task(labelled, problem="lm").problem == "lm"


def test_a_text_file_has_a_text_between_blank_lines(tmp_path):
    content = "\ufeff" + "\r\n\r\n".join(f"Paragraph {i},\r\nsecond line." for i in range(100)) + "\r\n \r\n\r\n"
    splits = get_task(write(tmp_path / "d.txt", content)).read()
    texts = {t for e in splits.values() for t in e.texts}
    assert texts == {f"Paragraph {i},\nsecond line." for i in range(100)}


def test_prompts_as_jsonl(tmp_path):
    rows = prompts()
    rows[3]["completion"], rows[4]["completion"] = " with its own space", "\nwith a new line"
    rows[5]["prompt"] = "ends with a space "
    task = get_task(write(tmp_path / "d.jsonl", jsonl(rows)), max_length=64)
    splits = task.read()
    assert (task.problem, task.metric, task.max_length, task.max_completion) == ("seq2seq", "rougeL", 64, 64)
    found = {t: c for e in splits.values() for t, c in zip(e.texts, e.completions, strict=True)}
    assert found["question 7?"] == " answer 7" and found["ends with a space "] == "answer 5"
    assert found["question 3?"] == " with its own space" and found["question 4?"] == "\nwith a new line"
    assert splits["train"].tails is None and splits["train"].users is None
    assert get_task(tmp_path / "d.jsonl", metric="perplexity").metric == "perplexity"


def test_each_user_has_a_part_of_every_split(tmp_path):
    rows = [row | {"user": ("ann", "bob")[i % 2]} for i, row in enumerate(prompts(200))]
    splits = get_task(write(tmp_path / "d.jsonl", jsonl(rows))).read()
    for examples in splits.values():
        mine = examples.of_user("bob")
        assert 0 < len(mine) < len(examples) and set(mine.users) == {"bob"}
        assert all(int(t.removeprefix("question ")[:-1]) % 2 for t in mine.texts)
        with pytest.raises(UnknownNameError, match="unknown user 'Bobb': did you mean 'bob'"):
            examples.of_user("Bobb")


def test_the_same_row_of_two_users_is_no_duplicate(tmp_path):
    rows = [row | {"user": user} for row in prompts(100) for user in ("ann", "bob", "bob")]
    splits = get_task(write(tmp_path / "d.jsonl", jsonl(rows))).read()
    assert sum(map(len, splits.values())) == 200


def test_a_folder_with_its_own_splits(tmp_path):
    write(tmp_path / "train.txt", "one\n\ntwo\n\nthree")
    with pytest.raises(DataError, match="no train or no validation file"):
        get_task(tmp_path)
    write(tmp_path / "validation.jsonl", jsonl([{"text": "four"}]))
    splits = get_task(tmp_path).read()
    assert {s: e.texts for s, e in splits.items()} == {"train": ["one", "two", "three"], "validation": ["four"]}
    write(tmp_path / "train.jsonl", jsonl([{"text": "four"}]))
    with pytest.raises(DataError, match=r"has both train\.jsonl and train\.txt"):
        get_task(tmp_path)


GOOD, GOOD_TEXT = jsonl(prompts(4)), jsonl({"text": f"text {i}"} for i in range(4))
BAD_FILES = {
    "no completion": (GOOD + '{"prompt": "a"}\n', r"line 5: no field 'completion'; it has \['prompt'\]"),
    "no prompt": ('{"completion": "a"}\n', r"line 1: no field 'prompt'; it has \['completion'\]"),
    "empty prompt": (GOOD + "\n" + '{"prompt": " ", "completion": "a"}\n', r"line 6: prompt is ' '; expected a text"),
    "empty completion": (GOOD + '{"prompt": "a", "completion": ""}\n', r"line 5: completion is ''"),
    "completion no string": (GOOD + '{"prompt": "a", "completion": 3}\n', r"line 5: completion is 3"),
    "completion null": (GOOD + '{"prompt": "a", "completion": null}\n', r"line 5: completion is None"),
    "empty user": (jsonl(prompts(4, user="ann")) + jsonl(prompts(1, user="")), r"line 5: user is ''"),
    "user no string": (jsonl(prompts(4, user="ann")) + jsonl(prompts(1, user=7)), r"line 5: user is 7"),
    "user now and then": (GOOD + jsonl(prompts(1, user="ann")), r"line 5: some rows have a user and some have none"),
    "user at first": (jsonl(prompts(1, user="ann")) + GOOD, r"line 2: some rows have a user and some have none"),
    "bad JSON": (GOOD + "{oops}\n", r"line 5: not JSON"),
    "not an object": (GOOD + '"a"\n', r"line 5: expected an object with prompt and completion"),
    "text no string": (GOOD_TEXT + '{"text": 3}\n', r"line 5: text is 3; expected a text that is not empty"),
    "no text": (GOOD_TEXT + '{"txt": "a"}\n', r"line 5: no field 'text'; it has \['txt'\]"),
    "label now and then": (GOOD_TEXT + '{"text": "a", "label": 1}\n', r"line 5: some rows have a label and some"),
    "not UTF-8": (GOOD_TEXT.encode() + b'{"text": "caf\xe9"}\n', r"line 5: not UTF-8 \(byte 0xe9\)"),
    "empty": ("", r"line 1: the file is empty; expected rows with text and label, with text, or with prompt"),
    "too few": (GOOD, r"4 rows are too few to split"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_the_line(tmp_path, case):
    content, message = BAD_FILES[case]
    with pytest.raises(DataError, match=r"d\.jsonl.*" + message):
        get_task(write(tmp_path / "d.jsonl", content))


def test_options_that_make_no_sense(tmp_path):
    file = write(tmp_path / "d.jsonl", jsonl(prompts()))
    with pytest.raises(ConfigError, match=r"labels are the names of classes, and d\.jsonl is a seq2seq task"):
        get_task(file, labels=["a", "b"])
    with pytest.raises(DataError, match=r"line 1: no field 'text'"):
        get_task(file, problem="lm")
    with pytest.raises(DataError, match=r"d\.txt is not a data file: expected one of \.jsonl\."):
        get_task(write(tmp_path / "d.txt", "some text"), problem="seq2seq")
    with pytest.raises(DataError, match=r"expected one of \.jsonl, \.txt"):
        get_task(write(tmp_path / "d.csv", "text,label\na,b\n"), problem="lm")
    with pytest.raises(DataError, match="cannot be read"):
        get_task(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="problem is 'causal'; expected one of classification, regression, lm, seq"):
        get_task(file, problem="causal")


# --- XSum, CNN/DailyMail, CoQA, SciQ --------------------------------------------------------------------------


def whole(examples):
    return [t + tail + c for t, tail, c in zip(examples.texts, examples.tails, examples.completions, strict=True)]


def test_summaries(prompted_dir):
    task = get_task("xsum", data_dir=prompted_dir)
    splits = task.read()
    assert (task.problem, task.metric, task.template) == ("seq2seq", "rougeL", "{text}\n\nTL;DR:")
    assert {s: len(e) for s, e in splits.items()} == {"train": 59, "validation": 2, "test": 3}  # one has no summary
    assert "é article 1.\n\nTL;DR: summary 1" in whole(splits["test"])
    news = get_task("cnn_dailymail", data_dir=prompted_dir).read()
    assert {s: len(e) for s, e in news.items()} == SIZES
    assert "article 1.\n\nTL;DR: one 1\ntwo" in whole(news["train"])


def test_conversations(prompted_dir):
    splits = get_task("coqa", data_dir=prompted_dir).read()
    assert len(splits["test"]) == 16
    for i in range(4):
        assert f"story {i}.\n\nQ: who {i} 0?\nA: é 0" in whole(splits["test"])
        shown = f"story {i}.\n\nQ: who {i} 1?\nA: é 1\nQ: who {i} 2?\nA: é 2\nQ: who {i} 3?\nA: é 3"
        assert shown in whole(splits["test"])
    # no validation split of its own: a tenth of the stories, all questions of a story together
    stories = {s: set(splits[s].texts) for s in ("train", "validation")}
    assert not stories["train"] & stories["validation"] and len(stories["train"] | stories["validation"]) == 60
    assert stories["validation"] == {f"story {i}." for i in range(60) if 80 <= text_hash(f"story {i}.") % 100 < 90}
    assert len(splits["train"]) == 4 * len(stories["train"])


def test_science_questions(prompted_dir):
    splits = get_task("sciq", data_dir=prompted_dir).read()
    assert {s: len(e) for s, e in splits.items()} == SIZES
    assert "support 1.\n\nQuestion: why 1?\nAnswer: a1" in whole(splits["test"])
    assert "Question: why 2?\nAnswer: a2" in whole(splits["test"])  # without a support


def test_a_record_without_its_fields(prompted_dir, monkeypatch):
    monkeypatch.setitem(RECORDS, "xsum", None)
    wrong = PROMPTED_SETS["xsum"].__class__(**vars(PROMPTED_SETS["xsum"]) | {"rows": PROMPTED_SETS["sciq"].rows})
    monkeypatch.setitem(PROMPTED_SETS, "xsum", wrong)
    with pytest.raises(DataError, match=r"xsum train, record 0: no field 'support'; it has \['document', 'summary'\]"):
        read_prompted("xsum", prompted_dir)


@pytest.fixture
def no_preparing(monkeypatch):
    """Neither TensorFlow nor Hugging Face's datasets is installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("tensorflow", "datasets") else real(name, *a)
    )


@pytest.mark.parametrize("name", PROMPTED_SETS)
def test_what_is_not_there_and_cannot_be_prepared(tmp_path, name, no_preparing):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DownloadError, match=rf"'{name}' is not there prepared .*pip install datasets"):
        get_task(name, data_dir=tmp_path).read()


def test_what_hugging_face_prepares(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    seen, hub = [], types.ModuleType("datasets")
    hub.__spec__ = importlib.machinery.ModuleSpec("datasets", None)

    def load_dataset(*which):
        seen.append(which)
        if len(seen) > 2:
            raise ConnectionError("cannot reach the hub\nmore")
        record = RECORDS["sciq" if "sciq" in which[0] else "cnn_dailymail"]
        return {split: [record(i) for i in range(n)] for split, n in SIZES.items()}

    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "tensorflow" else real(n, *a))
    splits = get_task("sciq", data_dir=tmp_path).read()
    assert "support 1.\n\nQuestion: why 1?\nAnswer: a1" in whole(splits["test"])
    assert {s: len(e) for s, e in get_task("cnn_dailymail", data_dir=tmp_path).read().items()} == SIZES
    assert seen == [("allenai/sciq",), ("abisee/cnn_dailymail", "3.0.0")]
    with pytest.raises(DownloadError, match=r"datasets could not load 'stanfordnlp/coqa': ConnectionError: cannot"):
        get_task("coqa", data_dir=tmp_path).read()


def test_modules_of_tensorflow_datasets_exist():
    pytest.importorskip("tensorflow_datasets")
    for name, spec in PROMPTED_SETS.items():
        assert name in task_names() and spec.template.startswith("{text}") and len(spec.template.splitlines()) > 1
        if spec.module is not None:
            assert importlib.util.find_spec(f"tensorflow_datasets.{spec.module}") is not None
