"""The user's own data: .jsonl and .csv files with the fields text, label and perhaps text_pair."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlfs_jax.data.examples import Examples, split_by_hash
from mlfs_jax.errors import ConfigError, DataError, first_line


class Row(NamedTuple):
    line: int  # in the file, from 1
    text: str
    pair: str | None
    label: str | int | float


def read_splits(
    path: Path, problem: str | None, labels: Sequence[str] | None
) -> tuple[str, tuple[str, ...], dict[str, Examples]]:
    """(problem, label names, splits) of a file, split by hash, or of a folder with its own split files.

    Strings and whole numbers are classes (sorted, if `labels` does not say), fractions are scores to regress
    on.
    """
    if labels is not None and problem == "regression":
        raise ConfigError("labels are the names of classes; with problem='regression' leave them out.")
    tables = {split: (file, read_rows(file)) for split, file in split_files(path, READERS).items()}
    file, rows = tables["train"]
    problem = problem or ("regression" if any(isinstance(r.label, float) for r in rows) else "classification")
    names, indexed = _label_names(file, rows, labels) if problem == "classification" else ((), False)
    splits = {split: _examples(*table, problem, names, indexed) for split, table in tables.items()}
    paired = {split: part.pairs is not None for split, part in splits.items()}
    if len({*paired.values()}) > 1:
        having, lacking = ([split for split, pair in paired.items() if pair is which] for which in (True, False))
        raise DataError(f"{path}: text_pair is in {' and '.join(having)} and not in {' and '.join(lacking)}.")
    if not path.is_dir():
        splits = split_file(path, splits["train"])
    if problem == "classification" and len(np.unique(splits["train"].labels)) < 2:
        raise DataError(
            f"{file}: the training rows have a single class, {names[splits['train'].labels[0]]!r}; "
            "nothing can be learnt from them."
        )
    return problem, names, splits


def split_files(path: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """{"train": path} of a file, and of a folder its train.*, validation.* and perhaps test.* files."""
    if not path.is_dir():
        return {"train": path}
    found = {}
    for split in ("train", "validation", "test"):
        files = [file for suffix in suffixes if (file := path / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise DataError(f"{path} has both {files[0].name} and {files[1].name}; keep one.")
        if files:
            found[split] = files[0]
    if "train" not in found or "validation" not in found:
        raise DataError(
            f"{path} has no train or no validation file; expected train and validation "
            f"({' or '.join(dict.fromkeys(suffixes))}), or give one file, which is then split by a hash of the text."
        )
    return found


def split_file(path: Path, examples: Examples) -> dict[str, Examples]:
    """The examples of one file split by hash; raises `DataError` where they are too few for that."""
    splits = split_by_hash(examples)
    empty = [split for split in splits if not len(splits[split])]
    if empty:
        raise DataError(
            f"{path}: {len(examples)} rows are too few to split: {' and '.join(empty)} would be empty; "
            "add rows, or give a folder with train.*, validation.* (and test.*) files."
        )
    return splits


def read_content(file: Path, suffixes: Iterable[str], fields: str) -> str:
    """The text of a data file; raises `DataError` for another suffix, for what is not UTF-8 and for nothing."""
    if file.suffix not in suffixes:
        raise DataError(f"{file} is not a data file: expected one of {', '.join(suffixes)}.")
    try:
        raw = file.read_bytes()
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror}.") from e
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 (byte 0x{raw[e.start]:02x}); save the file as UTF-8.") from e
    if not content.strip():
        raise DataError(f"{file}, line 1: the file is empty; expected {fields}.")
    return content


def read_rows(file: Path) -> list[Row]:
    """The rows of a .jsonl or .csv file; raises `DataError` naming the file and the line."""
    content = read_content(file, READERS, "rows with the fields text and label")
    rows = READERS[file.suffix](file, content)
    if not rows:
        raise DataError(f"{file}, line 2: there are no rows below the header.")
    numbers = {type(r.label) for r in rows}
    if str in numbers and numbers != {str}:
        odd = next(r for r in rows if isinstance(r.label, str) != isinstance(rows[0].label, str))
        raise DataError(
            f"{file}, line {odd.line}: label {odd.label!r}, but line {rows[0].line} has "
            f"{rows[0].label!r}; labels are all strings or all numbers."
        )
    if any((r.pair is None) != (rows[0].pair is None) for r in rows):
        odd = next(r for r in rows if (r.pair is None) != (rows[0].pair is None))
        raise DataError(f"{file}, line {odd.line}: some rows have a text_pair and some have none.")
    return rows


def json_records(file: Path, content: str, fields: str) -> Iterator[tuple[int, dict]]:
    """(line, object) of each line of a .jsonl file that is not blank; `fields` says what is expected."""
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as e:
            raise DataError(f"{file}, line {line}: not JSON: {e.msg} at column {e.colno}.") from e
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{file}, line {line}: JSON that cannot be read: {first_line(e)}.") from e
        if not isinstance(record, dict):
            raise DataError(f"{file}, line {line}: expected an object with {fields}, got {text.strip()[:40]!r}.")
        try:  # JSON may name half a character, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            half = f"\\u{ord(e.object[e.start]):04x}"
            raise DataError(f"{file}, line {line}: {half} is half of a surrogate pair; write it whole.") from e
        yield line, record


def _read_jsonl(file: Path, content: str) -> list[Row]:
    return [_row(file, line, record) for line, record in json_records(file, content, "text and label")]


def _read_csv(file: Path, content: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    records = []
    limit = csv.field_size_limit(len(content) + 1)
    try:
        header = reader.fieldnames or []
        missing = {"text", "label"} - set(header)
        if missing:
            raise DataError(f"{file}, line 1: no column {' and '.join(sorted(missing))}; the header has {header}.")
        if twice := [name for name in ("text", "text_pair", "label") if header.count(name) > 1]:
            raise DataError(f"{file}, line 1: the column {twice[0]!r} is there {header.count(twice[0])} times.")
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{file}, line {reader.line_num}: expected {len(header)} fields; quote texts that hold a comma."
                )
            records.append((reader.line_num, record))
    except csv.Error as e:
        raise DataError(f"{file}, line {reader.line_num}: not CSV: {e}.") from e
    finally:
        csv.field_size_limit(limit)
    # A CSV has no types: the labels are numbers if every one of them is written as one, and none is lost by that.
    for number, written in NUMBERS.items():
        if not all(written.fullmatch(record["label"]) for _, record in records):
            continue
        typed = [number(record["label"]) for _, record in records]
        records = [(line, record | {"label": label}) for (line, record), label in zip(records, typed, strict=True)]
        break
    return [_row(file, line, record) for line, record in records]


NUMBERS = {
    int: re.compile(r" *(0|-?[1-9][0-9]{0,17}) *"),
    float: re.compile(r" *-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)? *|nan|-?inf", re.IGNORECASE),
}
"""How a label is written that is a number: not 0042 nor +1 nor one of twenty digits, which are names. What is not
finite is refused later."""

READERS = {".jsonl": _read_jsonl, ".csv": _read_csv}


def _row(file: Path, line: int, record: dict) -> Row:
    for field in ("text", "label"):
        if field not in record:
            raise DataError(f"{file}, line {line}: no field {field!r}; it has {sorted(record)}.")
    text, pair, label = record["text"], record.get("text_pair"), record["label"]
    for field, value in (("text", text), ("text_pair", pair)):
        if (value is not None or field == "text") and (not isinstance(value, str) or not value.strip()):
            raise DataError(f"{file}, line {line}: {field} is {value!r}; expected a text that is not empty.")
    if isinstance(label, bool):
        label = int(label)
    if (
        not isinstance(label, str | int | float)
        or label == ""
        or (isinstance(label, float) and not math.isfinite(label))
    ):
        raise DataError(
            f"{file}, line {line}: label is {label!r}; expected a class (string or whole number) or a finite score."
        )
    return Row(line, text, pair, label)


def _label_names(file: Path, rows: list[Row], labels: Sequence[str] | None) -> tuple[tuple[str, ...], bool]:
    """The classes, and whether the files name them by their indices."""
    if labels is None:
        return tuple(str(v) for v in sorted({r.label for r in rows})), False
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ConfigError(f"labels are {tuple(labels)}; expected two or more different names.")
    names = tuple(str(v) for v in labels)
    if isinstance(rows[0].label, str) or set(names) >= {str(r.label) for r in rows}:
        return names, False
    for r in rows:  # whole numbers that are not names are indices
        if not isinstance(r.label, int) or not 0 <= r.label < len(names):
            raise DataError(f"{file}, line {r.line}: label {r.label!r} is outside 0..{len(names) - 1}.")
    return names, True


def _examples(file: Path, rows: list[Row], problem: str, names: tuple[str, ...], indexed: bool) -> Examples:
    pairs = None if rows[0].pair is None else [r.pair for r in rows]
    texts = [r.text for r in rows]
    if problem == "regression":
        for r in rows:
            if isinstance(r.label, str):
                raise DataError(f"{file}, line {r.line}: label {r.label!r} is not a number, as regression needs.")
            if abs(r.label) > float(np.finfo(np.float32).max):
                raise DataError(f"{file}, line {r.line}: label {str(r.label)[:40]} is beyond what a float32 holds.")
        return Examples(texts, np.array([r.label for r in rows], np.float32), pairs)
    index = {name: i for i, name in enumerate(names)}
    classes = []
    for r in rows:
        i = r.label if indexed and isinstance(r.label, int) else index.get(str(r.label), -1)
        if not 0 <= i < len(names):
            raise DataError(
                f"{file}, line {r.line}: label {r.label!r} is outside the known labels ({', '.join(names[:20])})."
            )
        classes.append(i)
    return Examples(texts, np.array(classes, np.int32), pairs)
