"""Tasks: where the text and labels come from, what the labels mean, and which metric counts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlfs_jax import metrics, registry
from mlfs_jax.data import files, text_files
from mlfs_jax.data.examples import Examples, split_by_hash
from mlfs_jax.data.glue import GLUE, read_glue
from mlfs_jax.data.language import LANGUAGE, LanguageSpec
from mlfs_jax.data.prompted_sets import PROMPTED_SETS, PromptedSet, read_prompted
from mlfs_jax.errors import ConfigError, DataError, unknown

__all__ = ["Examples", "Task", "get_task", "task_names"]

WIKI_TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)

# The first is a task's own metric where nothing else is said.
_CLASSES, _SCORES = ("accuracy", "f1", "f1_macro", "matthews"), ("pearson", "spearman")
PROBLEM_METRICS: dict[str, tuple[str, ...]] = {
    "classification": (*_CLASSES, *_SCORES),  # correlation of class numbers: for ordered ones
    "regression": _SCORES,
    "lm": ("perplexity",),
    "seq2seq": ("rougeL", "rouge1", "rouge2", "perplexity"),
}


@dataclass(frozen=True)
class Task:
    """A task; `read()` gives {"train": Examples, "validation": ...}, and "test" if its labels are public."""

    name: str
    read: Callable[[], dict[str, Examples]]
    problem: str  # "classification" | "regression" | "lm" (running text) | "seq2seq" (prompt -> completion)
    labels: tuple[str, ...]  # class names in index order; () for all but classification
    metric: str  # a name in metrics.METRICS, one that the problem can be measured by
    max_length: int  # tokens; longer texts are cut
    description: str = ""
    template: str = ""  # seq2seq: how a prompt is written around its {text}; "" for prompts as they stand
    max_completion: int = 0  # seq2seq: the most tokens of a completion, end-of-text included

    def __post_init__(self):
        _check_problem(self.problem)
        metrics.get_metric(self.metric)
        if self.metric not in PROBLEM_METRICS[self.problem]:
            raise ConfigError(
                f"metric is {self.metric!r}; a {self.problem} task is measured by one of "
                f"{', '.join(PROBLEM_METRICS[self.problem])}."
            )
        if self.metric == "f1" and len(self.labels) != 2:
            raise ConfigError(
                f"metric is 'f1', which is of two classes (the second is the one looked for); {self.name} has "
                f"{len(self.labels)}: take f1_macro."
            )
        if self.problem == "seq2seq" and self.max_completion < 2:
            raise ConfigError(f"max_completion is {self.max_completion}; expected at least 2 tokens.")

    @property
    def is_language(self) -> bool:
        """Whether the tokens themselves are what is predicted: a task for language models."""
        return self.problem in ("lm", "seq2seq")

    @property
    def num_labels(self) -> int:
        """C, the width of the model's head: the number of classes, 1 for regression, 0 for language (no such head)."""
        return {"classification": len(self.labels), "regression": 1}.get(self.problem, 0)


def _check_problem(problem: str) -> None:
    if problem not in PROBLEM_METRICS:
        raise ConfigError(f"problem is {problem!r}; expected one of {', '.join(PROBLEM_METRICS)}.")


def task_names() -> tuple[str, ...]:
    """The names `get_task` knows; paths of .jsonl, .csv and .txt files, and folders of them, come on top."""
    return ("wiki-topic", "movie", *GLUE, *LANGUAGE, *PROMPTED_SETS)


def get_task(
    name_or_path: str | Path,
    *,
    problem: str | None = None,
    labels: Sequence[str] | None = None,
    metric: str | None = None,
    max_length: int | None = None,
    data_dir: str | Path | None = None,
) -> Task:
    """The task called `name_or_path`, or the task in the user's own files.

    Own files: a .jsonl or .csv file with the fields text, label and, for pairs, text_pair; for language, a .txt file or
    a .jsonl file with text alone, or one with prompt, completion and perhaps user (see `text_files.read_language`).
    They are split by a hash of the text, or come as a folder with train.*, validation.* and perhaps test.*. `problem`
    and `labels` (class names in index order) are inferred where not given; they, and `data_dir` (of
    tensorflow-datasets), apply only where they make sense. Raises `UnknownNameError` with the nearest names,
    `DataError` with the file's line, `ConfigError` for a bad option.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    known = name in task_names()
    if known and (problem is not None or labels is not None):
        raise ConfigError(f"problem and labels of the task {name!r} are fixed; they can be given for own files only.")
    if name == "wiki-topic":
        task = Task(
            name,
            _read_wiki_topic,
            "classification",
            WIKI_TOPICS,
            "accuracy",
            128,
            "Wikipedia lead to topic, 11 classes",
        )
    elif name == "movie":
        task = Task(
            name,
            _read_movie,
            "classification",
            ("negative", "positive"),
            "accuracy",
            64,
            "movie review sentence to sentiment",
        )
    elif name in GLUE:
        spec = GLUE[name]
        task = Task(
            name,
            lambda: read_glue(name, data_dir),
            spec.problem,
            spec.labels,
            spec.metric,
            128,
            spec.description,
        )
    elif name in LANGUAGE or name in PROMPTED_SETS:
        task = _language_task(name, data_dir)
    elif path.is_file() or path.is_dir() or path.suffix.lower() in (*files.READERS, *text_files.SUFFIXES["lm"]):
        task = _file_task(path, problem, labels)
    else:
        raise unknown("task (nor is it a .jsonl, .csv or .txt file)", name, task_names())
    changes = {"metric": metric, "max_length": max_length}
    return Task(**(vars(task) | {k: v for k, v in changes.items() if v is not None}))


def _language_task(name: str, data_dir: str | Path | None) -> Task:
    spec: LanguageSpec | PromptedSet
    if name in LANGUAGE:
        spec = known = LANGUAGE[name]
        problem, read = known.problem, known.read
    else:
        spec = PROMPTED_SETS[name]
        problem, read = "seq2seq", lambda: read_prompted(name, data_dir)
    metric, sizes = PROBLEM_METRICS[problem][0], (spec.max_length, spec.description, spec.template, spec.max_completion)
    return Task(name, read, problem, (), metric, *sizes)


def _file_task(path: Path, problem: str | None, labels: Sequence[str] | None) -> Task:
    description = f"own data in {path.name}"
    language = problem if problem in text_files.SUFFIXES else None
    if problem is not None:
        _check_problem(problem)
    else:
        language = text_files.language_of(path)
    if language is None:
        problem, names, splits = files.read_splits(path, problem, labels)
        metric = "accuracy" if problem == "classification" else "pearson"
        return Task(str(path), lambda: splits, problem, names, metric, 128, description)
    if labels is not None:
        raise ConfigError(f"labels are the names of classes, and {path.name} is a {language} task; leave them out.")
    texts = text_files.read_language(path, language)
    metric, longest = PROBLEM_METRICS[language][0], 64 if language == "seq2seq" else 0
    return Task(str(path), lambda: texts, language, (), metric, 256, description, "", longest)


def _read_wiki_topic() -> dict[str, Examples]:
    file = registry.fetch("wiki") / "summaries_en-us.json"
    articles = json.loads(file.read_text(encoding="utf-8")).values()
    index = {topic: i for i, topic in enumerate(WIKI_TOPICS)}
    # "Uncategorized" is the absence of a label, not a twelfth topic.
    kept = [a for a in articles if a["topic"] != "Uncategorized" and a["extract"].strip()]
    strange = {a["topic"] for a in kept} - set(index)
    if strange:
        raise DataError(f"{file} has topics that the task does not know: {sorted(strange)}.")
    labels = np.array([index[a["topic"]] for a in kept], np.int32)
    return split_by_hash(Examples([a["extract"].strip() for a in kept], labels))


def _read_movie() -> dict[str, Examples]:
    file = registry.fetch("movie") / "movieReviewSnippets_GroundTruth.txt"
    texts, labels = [], []
    for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:  # nearer to 0 the raters did not agree on a side
            texts.append(text.strip())
            labels.append(int(float(score) > 0))
    return split_by_hash(Examples(texts, np.array(labels, np.int32)))
