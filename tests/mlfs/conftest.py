"""What the tests of palette, export, verify and the command line share: a run of a very small model, made once."""

import json
import shutil

import jax
import pytest

from mlfs_jax.cli import main
from mlfs_jax.hf.export import export_hf
from mlfs_jax.model import init_model
from tests.mlfs.tiny import tiny_config

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
FILLERS = ("the", "film", "was", "very", "quite", "rather", "long", "short")


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory):
    """A Hugging Face folder: a random BERT of 2 layers without a head, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("hf")
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLERS)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = tiny_config("bert", head="none", labels=0, layers=2, vocab_size=len(words))
    export_hf(init_model(config, jax.random.key(0)), folder / "model", tokenizer_from=folder)
    return folder / "model"


@pytest.fixture(scope="session")
def mood_task(tmp_path_factory):
    """A task that a very small model learns in seconds: is there a good word, or a bad one?"""
    file = tmp_path_factory.mktemp("task") / "mood.jsonl"
    rows = []
    for i in range(240):
        words = [FILLERS[(i >> k) % len(FILLERS)] for k in range(1 + i % 5)]
        words.insert(i % 3, (GOOD, BAD)[i % 2][i // 2 % 4])
        rows.append({"text": " ".join([*words, FILLERS[i // 8 % 8], FILLERS[i // 64]]), "label": ("up", "down")[i % 2]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def fit_flags(tiny_hf, mood_task):
    """The arguments of ``mlfs fit`` but for ``--out``: seconds, on any machine."""
    flags = f"fit --model {tiny_hf} --task {mood_task} --steps 80 10 10 --max-length 12 --buckets 12 --batch-size 16"
    return (
        f"{flags} --random-subnets 0 --learning-rate 1e-2 --width 1 0.5 --depth 1 0.5 --rank 4 --unroll False".split()
    )


@pytest.fixture(scope="session")
def _run(fit_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mood"
    assert main([*fit_flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def tiny_run(_run, tmp_path):
    """A finished run's folder, for this test alone."""
    return shutil.copytree(_run, tmp_path / "run")
