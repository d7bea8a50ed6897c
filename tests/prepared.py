"""Small data sets in the formats of the large ones: GLUE as downloaded, the prompted sets as array_record files."""

import numpy as np
import pytest

from mlfs_jax.data.glue import read_glue

SENTENCE = ("sentence\tlabel", lambda i: f"a film é {i}\t{i % 2}")
SCORE = ("index\tsentence1\tsentence2\tscore", lambda i: f"{i}\tone {i}\ttwo {i}\t{i * 0.5}")
UNSEEN = ("index\tsentence1\tsentence2", lambda i: f"{i}\ta\tb")
MNLI_LABELS = ("entailment", "neutral", "contradiction")


def mnli(file):
    header = "index\tsentence1\tsentence2\tgold_label"
    return header, lambda i: f"{i}\tp {file} {i}\th {i}\t{MNLI_LABELS[i % 3]}"


# config -> folder, {file: (header, row of a number, rows)}: GLUE's own download format
GLUE_TSV = {
    "sst2": (
        "SST-2",
        {"train": (*SENTENCE, 9), "dev": (*SENTENCE, 4), "test": ("index\tsentence", lambda i: f"{i}\tunseen", 1)},
    ),
    "stsb": ("STS-B", {"train": (*SCORE, 8), "dev": (*SCORE, 4), "test": (*UNSEEN, 1)}),
    "mnli": (
        "MNLI",
        {f: (*mnli(f), n) for f, n in (("train", 9), ("dev_matched", 3), ("dev_mismatched", 4))}
        | {f: (*UNSEEN, 1) for f in ("test_matched", "test_mismatched")},
    ),
}


def glue_download(folder, config):
    name, files = GLUE_TSV[config]
    (folder / name).mkdir(parents=True)
    for file, (header, row, n) in files.items():
        (folder / name / f"{file}.tsv").write_text("\n".join([header, *map(row, range(n))]) + "\n", encoding="utf-8")
    return str(folder)


def prepare_glue(folder) -> None:
    """glue/sst2, glue/stsb and glue/mnli, prepared by their own builder from a faked download."""
    tfds = pytest.importorskip("tensorflow_datasets")
    with pytest.MonkeyPatch.context() as m:
        for config in GLUE_TSV:
            raw = glue_download(folder / "raw", config)
            m.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url, raw=raw: raw)
            read_glue(f"glue/{config}", folder)


def coqa(i):
    questions = [f"who {i} {k}?" for k in range(4)]
    answers = {"input_text": [f"é {k}" for k in range(4)], "answer_start": [0] * 4, "answer_end": [1] * 4}
    return {"source": "made up", "story": f"story {i}.", "questions": questions, "answers": answers}


RECORDS = {
    "xsum": lambda i: {"document": f"é article {i}.", "summary": "" if i == 2 else f"summary {i}"},
    "cnn_dailymail": lambda i: {"article": f"article {i}.", "highlights": f"one {i}\ntwo", "publisher": "x", "id": "y"},
    "coqa": coqa,
    "sciq": lambda i: {"question": f"why {i}?", "support": f"support {i}." if i % 2 else "", "correct_answer": f"a{i}"},
}
SIZES = {"train": 60, "validation": 3, "test": 4}


def prepare_prompted(folder) -> None:
    """XSum, CNN/DailyMail, CoQA and SciQ, written by tensorflow-datasets as array_record files."""
    tfds = pytest.importorskip("tensorflow_datasets")
    f = tfds.features
    turns = {"input_text": f.Text(), "answer_start": np.int32, "answer_end": np.int32}
    features = {
        "xsum": ("1.1.0", dict.fromkeys(("document", "summary"), f.Text())),
        "cnn_dailymail": ("3.4.0", dict.fromkeys(("article", "highlights", "publisher", "id"), f.Text())),
        "coqa": (
            "1.0.0",
            {"source": f.Text(), "story": f.Text(), "questions": f.Sequence(f.Text()), "answers": f.Sequence(turns)},
        ),
        "sciq": ("0.1.0", dict.fromkeys(("question", "support", "correct_answer"), f.Text())),
    }
    for dataset, (version, fields) in features.items():
        sizes = {s: n for s, n in SIZES.items() if dataset != "coqa" or s != "validation"}

        class Local(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name, VERSION = dataset, tfds.core.Version(version)
            made_of, of, number = fields, RECORDS[dataset], sizes

            @classmethod
            def get_metadata(cls):
                return None

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(self.made_of))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(n) for split, n in self.number.items()}

            def _generate_examples(self, n):
                return ((i, type(self).of(i)) for i in range(n))

        Local(data_dir=str(folder), file_format="array_record").download_and_prepare()
