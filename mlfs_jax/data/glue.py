"""GLUE's nine tasks through tensorflow-datasets' array_record files: no TensorFlow is imported."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlfs_jax.data.examples import Examples
from mlfs_jax.data.tfds import as_text, open_dataset
from mlfs_jax.errors import DataError


@dataclass(frozen=True)
class GlueSpec:
    texts: tuple[str, ...]  # the one or two text fields
    labels: tuple[str, ...]
    metric: str  # the one GLUE reports, or the first of its two (Wang et al. 2019, table 1)
    description: str
    problem: str = "classification"


_ENTAIL = ("entailment", "not_entailment")
GLUE: dict[str, GlueSpec] = {
    "glue/cola": GlueSpec(("sentence",), ("unacceptable", "acceptable"), "matthews", "is the sentence grammatical"),
    "glue/sst2": GlueSpec(("sentence",), ("negative", "positive"), "accuracy", "sentiment of a movie review phrase"),
    "glue/mrpc": GlueSpec(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1", "news paraphrases"),
    "glue/qqp": GlueSpec(("question1", "question2"), ("not_duplicate", "duplicate"), "f1", "duplicate questions"),
    "glue/stsb": GlueSpec(("sentence1", "sentence2"), (), "pearson", "similarity from 0 to 5", "regression"),
    "glue/mnli": GlueSpec(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "natural language inference",
    ),
    "glue/qnli": GlueSpec(("question", "sentence"), _ENTAIL, "accuracy", "does the sentence answer the question"),
    "glue/rte": GlueSpec(("sentence1", "sentence2"), _ENTAIL, "accuracy", "textual entailment"),
    "glue/wnli": GlueSpec(
        ("sentence1", "sentence2"),
        ("not_entailment", "entailment"),
        "accuracy",
        "Winograd schemas as inference",
    ),
}
# MNLI has two validation sets: "validation" is that of the training genres. GLUE's test labels are secret.
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "validation_matched"),
    "validation_mismatched": ("validation_mismatched",),
}


def read_glue(name: str, data_dir: str | Path | None = None) -> dict[str, Examples]:
    """{"train", "validation", MNLI: "validation_mismatched"} of a GLUE task, in GLUE's own splits and order.

    `data_dir` is where tensorflow-datasets keeps its data sets (default: its own, $TFDS_DATA_DIR); a data set
    that is not there is downloaded. Raises `DownloadError` when that fails, `DataError` for records that do
    not fit the task.
    """
    sources = open_dataset(name, "text.glue", data_dir)
    splits = {}
    for split, candidates in SPLITS.items():
        for candidate in candidates:
            if candidate in sources:
                splits[split] = _examples(name, candidate, sources[candidate])
    if "train" not in splits or "validation" not in splits:
        raise DataError(f"{name!r} has the splits {sorted(sources)}; expected train and validation.")
    return splits


def _examples(name: str, split: str, source) -> Examples:
    spec = GLUE[name]
    columns: list[list[str]] = [[] for _ in spec.texts]
    labels = []
    for i, record in enumerate(source):
        missing = {*spec.texts, "label"} - set(record)
        if missing:
            raise DataError(f"{name} {split}, record {i}: no field {sorted(missing)}; it has {sorted(record)}.")
        for column, field in zip(columns, spec.texts, strict=True):
            column.append(as_text(record[field]))
        label = record["label"]
        if spec.labels and not 0 <= int(label) < len(spec.labels):
            raise DataError(f"{name} {split}, record {i}: label {int(label)} is outside 0..{len(spec.labels) - 1}.")
        labels.append(label)
    dtype = np.int32 if spec.labels else np.float32
    return Examples(columns[0], np.array(labels, dtype), columns[1] if len(columns) > 1 else None)
