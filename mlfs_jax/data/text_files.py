"""The user's own language data: texts (.txt, .jsonl with text), and prompts with completions (.jsonl)."""

import re
from pathlib import Path

from mlfs_jax.data.examples import Examples
from mlfs_jax.data.files import json_records, read_content, split_file, split_files
from mlfs_jax.errors import DataError

SUFFIXES = {"lm": (".jsonl", ".txt"), "seq2seq": (".jsonl",)}


def language_of(path: Path) -> str | None:
    """ "lm", "seq2seq", or None for data with labels, by a file's suffix and the fields of its first line.

    Of a folder, its train file decides.
    """
    if path.is_dir():
        path = next((file for suffix in (".jsonl", ".txt") if (file := path / f"train{suffix}").is_file()), path)
    if path.suffix == ".txt":
        return "lm"
    if path.suffix != ".jsonl":
        return None
    content = read_content(path, (".jsonl",), "rows with text and label, with text, or with prompt and completion")
    records = json_records(path, content, "fields")
    _, first = next(records)
    if {"prompt", "completion"} & set(first):
        return "seq2seq"
    if "text" not in first or "label" in first:
        return None
    for line, record in records:
        if "label" in record:
            raise DataError(f"{path}, line {line}: some rows have a label and some have none.")
    return "lm"


def read_language(path: Path, problem: str) -> dict[str, Examples]:
    """The splits of a file (by hash) or of a folder with its own split files, for "lm" or "seq2seq".

    lm: .jsonl with {"text": ...}, or .txt whose texts are separated by blank lines. seq2seq: .jsonl with {"prompt":
    ..., "completion": ...} and, on every line or on none, "user". Where neither the prompt ends with a space nor the
    completion begins with one, one is put between. Raises `DataError` naming file and line.
    """
    read = _read_texts if problem == "lm" else _read_prompts
    splits = {split: read(file) for split, file in split_files(path, SUFFIXES[problem]).items()}
    return splits if path.is_dir() else split_file(path, splits["train"])


def _read_texts(file: Path) -> Examples:
    content = read_content(file, SUFFIXES["lm"], "text")
    if file.suffix == ".txt":
        texts = (text.strip() for text in re.split(r"\n\s*\n", content.replace("\r\n", "\n")))
        return Examples([text for text in texts if text])
    return Examples([_field(file, line, record, "text") for line, record in json_records(file, content, "text")])


def _read_prompts(file: Path) -> Examples:
    expected = "prompt and completion"
    content = read_content(file, SUFFIXES["seq2seq"], f"rows with the fields {expected}")
    prompts, completions, users = [], [], []
    for line, record in json_records(file, content, expected):
        prompt, completion = (_field(file, line, record, name) for name in ("prompt", "completion"))
        users.append(_field(file, line, record, "user") if "user" in record else None)
        if (users[-1] is None) != (users[0] is None):
            raise DataError(f"{file}, line {line}: some rows have a user and some have none.")
        prompts.append(prompt)
        completions.append(completion if prompt[-1].isspace() or completion[0].isspace() else f" {completion}")
    return Examples(prompts, completions=completions, users=None if users[0] is None else users)


def _field(file: Path, line: int, record: dict, name: str) -> str:
    if name not in record:
        raise DataError(f"{file}, line {line}: no field {name!r}; it has {sorted(record)}.")
    if not isinstance(record[name], str) or not record[name].strip():
        raise DataError(f"{file}, line {line}: {name} is {record[name]!r}; expected a text that is not empty.")
    return record[name]
