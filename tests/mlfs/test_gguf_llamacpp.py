"""Files written here, run by llama.cpp: small models of every kind, and SmolLM2. Slow: needs llama-cpp-python.

It may be installed in an environment of its own, whose Python LLAMA_CPP_PYTHON then names; else it is looked for here.
"""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.config import Rope
from mlfs_jax.data import load_tokenizer
from mlfs_jax.hf.gguf_tokenizer import PRE_TOKENIZERS
from mlfs_jax.hf.gguf_write import export_gguf
from mlfs_jax.model import forward
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet
from tests.mlfs.gguf_files import TEXTS, byte_level_tokenizer, sentencepiece_tokenizer
from tests.mlfs.tiny import tiny_decoder

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SIZES = {"vocab_size": 405, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "max_positions": 64}
SIZES |= {"rope": Rope(10_000.0, 16)}


@pytest.fixture(scope="module", autouse=True)
def llama_cpp():
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not installed here, nor where LLAMA_CPP_PYTHON says")


def ask(file, **request):
    request = json.dumps({"model": str(file), **request})
    command = [PYTHON, EXPERIMENTS / "llamacpp_runner.py"]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def nll(model, ids):
    logp = jax.nn.log_softmax(forward(model.graphdef, model.base, {"input_ids": np.array([ids])}).logits[0, :-1])
    return -float(jnp.take_along_axis(logp, np.array(ids)[1:, None], -1).sum())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "kv_heads": 1},
        {"family": "qwen2", "qkv_bias": True},
        {"family": "qwen2", "qkv_bias": True, "embed": 64},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"rope": Rope(1e4, 16, scaling="linear", factor=2.0)},
        {"rope": Rope(1e4, 16, scaling="yarn", factor=4.0, original_positions=16)},
        {"rope": Rope(1e4, 16, scaling="yarn", factor=4.0, original_positions=16, beta_fast=8.0, attention_factor=1.3)},
        {"rope": Rope(100.0, 16, scaling="llama3", factor=4.0, original_positions=64)},
        {"sliced": Subnet(embed=24, heads=(2, 4), mlp=(32, 64), layers=(0, 2))},
    ],
    ids=str,
)
def test_small_models_in_f32(changes, tmp_path):
    """The same likelihood of 48 random tokens: every switch and rope scaling means the same on both sides."""
    changes = dict(changes)
    sliced = changes.pop("sliced", None)
    model = tiny_decoder("llama", **{**SIZES, **changes})
    model = model if sliced is None else slice_subnet(model, sliced)
    folder = byte_level_tokenizer(tmp_path / "tokenizer", PRE_TOKENIZERS["smollm"])
    report = export_gguf(model, tmp_path / "m.gguf", "f32", tokenizer_from=folder)
    ids = np.random.default_rng(0).integers(0, 400, 48).tolist()
    assert ask(report.path, texts=[ids])["nll"][0] == pytest.approx(nll(model, ids), rel=2e-5)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "sentencepiece"])
def test_tokenizers(pre, tmp_path):
    if pre == "sentencepiece":
        folder = sentencepiece_tokenizer(tmp_path / "tokenizer")
    else:
        kind = {"ignore_merges": pre == "llama-bpe", "normalizer": {"type": "NFC"} if pre == "qwen2" else None}
        folder = byte_level_tokenizer(tmp_path / "tokenizer", PRE_TOKENIZERS[pre], **kind)
    report = export_gguf(tiny_decoder("llama", **SIZES), tmp_path / "m.gguf", tokenizer_from=folder)
    tokenizer = load_tokenizer(folder)
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS]  # llama.cpp does not, for Qwen 2
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert ask(report.path, strings=texts)["ids"] == ids


def test_smollm2(monkeypatch):
    """What experiments/check_gguf_llamacpp.py measures, on fewer texts."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import check_gguf_llamacpp as check

    files = check.main(check.Options(llama_python=PYTHON, texts=32))["files"]
    for name, row in files.items():
        assert row["same_ids"] == len(check.STRINGS), name
    for name in ("F16", "slice F16"):
        assert files[name]["same_continuations"] == len(check.PROMPTS)
        assert files[name]["perplexity_llamacpp"] == pytest.approx(files[name]["perplexity_ours"], rel=1e-3)
    assert files["Q8_0"]["perplexity_llamacpp"] == pytest.approx(files["Q8_0"]["perplexity_before_export"], rel=5e-3)
