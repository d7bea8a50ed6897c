"""XSum, CNN/DailyMail, CoQA and SciQ: the data sets of the SPA paper, each as prompts and completions."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlfs_jax.data.examples import Examples, prompted, text_hash
from mlfs_jax.data.tfds import as_text, open_dataset
from mlfs_jax.errors import DataError, DownloadError

HISTORY = 2  # CoQA: earlier questions that are shown with their answers

Row = tuple[str, str, dict[str, str]]  # text, completion, the other fields of the template


@dataclass(frozen=True)
class PromptedSet:
    """A public data set as prompts.

    Attributes:
        template: how a prompt is written.
        rows: the examples in one record (CoQA: one for each question).
        module: where tensorflow-datasets defines it; None: it does not.
        hub: its id for Hugging Face's datasets, and its configuration there.
    """

    template: str
    rows: Callable[[dict], Iterable[Row]]
    module: str | None
    hub: tuple[str, ...]
    max_length: int
    max_completion: int
    description: str


def _coqa(record: dict) -> Iterable[Row]:
    story, questions = as_text(record["story"]), [as_text(q) for q in record["questions"]]
    answers = [as_text(a) for a in record["answers"]["input_text"]]
    turns = [f"Q: {q}\nA: {a}\n" for q, a in zip(questions, answers, strict=True)]
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield story, answer, {"history": "".join(turns[max(0, i - HISTORY) : i]), "question": question}


def _fields(text: str, completion: str, **others: str) -> Callable[[dict], Iterable[Row]]:
    def rows(record: dict) -> Iterable[Row]:
        yield (
            as_text(record[text]),
            as_text(record[completion]),
            {name: as_text(record[field]) for name, field in others.items()},
        )

    return rows


PROMPTED_SETS: dict[str, PromptedSet] = {
    "xsum": PromptedSet(
        "{text}\n\nTL;DR:",  # the prompt that GPT-2 was tried with on summaries (Radford et al. 2019, section 3.6)
        _fields("document", "summary"),
        "summarization.xsum",
        ("EdinburghNLP/xsum",),
        512,
        64,
        "BBC article to its one-sentence summary",
    ),
    "cnn_dailymail": PromptedSet(
        "{text}\n\nTL;DR:",
        _fields("article", "highlights"),
        "summarization.cnn_dailymail",
        ("abisee/cnn_dailymail", "3.0.0"),
        1024,
        128,
        "news article to its highlights",
    ),
    "coqa": PromptedSet(
        "{text}\n\n{history}Q: {question}\nA:",
        _coqa,
        "question_answering.coqa.coqa",
        ("stanfordnlp/coqa",),
        512,
        32,
        "story and question of a conversation to the answer",
    ),
    "sciq": PromptedSet(
        "{text}\n\nQuestion: {question}\nAnswer:",
        _fields("support", "correct_answer", question="question"),
        None,
        ("allenai/sciq",),
        256,
        16,
        "science exam question, with a supporting text, to the answer",
    ),
}


def read_prompted(name: str, data_dir: str | Path | None = None) -> dict[str, Examples]:
    """The splits of one of `PROMPTED_SETS`, in its own order.

    Prompts: xsum and cnn_dailymail "{article}\\n\\nTL;DR:"; coqa "{story}\\n\\n{two earlier turns}Q: {question}\\nA:";
    sciq "{support}\\n\\nQuestion: {question}\\nAnswer:". Records without text to complete or completion are left out.
    CoQA publishes no test split: its development set is "test" here, as in tensorflow-datasets, and a tenth of
    the training stories, by their hash, is "validation".

    Read from where tensorflow-datasets keeps it prepared (`data_dir`; array_record files). What does not lie there is
    prepared by tensorflow-datasets if TensorFlow is installed, which these four need for it, else by Hugging
    Face's datasets, if that is installed. Raises `DownloadError` where neither can, `DataError` for records that do
    not fit.
    """
    spec = PROMPTED_SETS[name]
    sources = _open(name, spec, data_dir)
    splits = {s: _examples(name, s, sources[s], spec) for s in ("train", "validation", "test") if s in sources}
    if "train" not in splits:
        raise DataError(f"{name!r} has the splits {sorted(sources)}; expected train.")
    if "validation" not in splits:
        held = [80 <= text_hash(text) % 100 < 90 for text in splits["train"].texts]
        rows = range(len(held))
        splits["validation"] = splits["train"].take([i for i in rows if held[i]])
        splits["train"] = splits["train"].take([i for i in rows if not held[i]])
    return splits


def _open(name: str, spec: PromptedSet, data_dir: str | Path | None) -> Mapping[str, Iterable[dict]]:
    with_tensorflow = importlib.util.find_spec("tensorflow") is not None
    try:
        return open_dataset(name, spec.module, data_dir, download=with_tensorflow and spec.module is not None)
    except DownloadError as e:
        if importlib.util.find_spec("datasets") is None:
            raise DownloadError(
                f"{name!r} is not there prepared (array_record files under data_dir or $TFDS_DATA_DIR), and preparing "
                f"it takes `pip install datasets`, or TensorFlow with tensorflow-datasets. {e}"
            ) from e
    import datasets

    try:
        return datasets.load_dataset(*spec.hub)
    except Exception as e:  # the hub client raises a dozen kinds
        first = (str(e).strip().splitlines() or [""])[0]
        raise DownloadError(
            f"datasets could not load {spec.hub[0]!r}: {type(e).__name__}: {first} Check the network, or put the data "
            "set, prepared by tensorflow-datasets as array_record files, under data_dir."
        ) from e


def _examples(name: str, split: str, records: Iterable[dict], spec: PromptedSet) -> Examples:
    texts, completions, fields = [], [], []
    for i, record in enumerate(records):
        try:
            for text, completion, others in spec.rows(record):
                if completion.strip() and (text.strip() or others):
                    texts.append(text.strip())
                    completions.append(completion.strip())
                    fields.append(others)
        except KeyError as e:
            raise DataError(f"{name} {split}, record {i}: no field {e}; it has {sorted(record)}.") from e
        except ValueError as e:
            raise DataError(f"{name} {split}, record {i}: {e}.") from e
    return prompted(spec.template, texts, completions, fields)
