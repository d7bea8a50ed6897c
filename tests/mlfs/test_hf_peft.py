"""Adapters in PEFT's format give the same logits through ``peft``."""

import errno
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlfs_jax import init_lora
from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.hf.card import AUTO
from mlfs_jax.hf.configs import from_hf
from mlfs_jax.hf.load import load_checkpoint
from mlfs_jax.hf.peft import export_peft
from mlfs_jax.lora import lora_sites, merge_lora, stack_stages
from mlfs_jax.model import init_model
from tests.mlfs.hf_oracle import (
    TOLERANCE,
    assert_equal_decoders,
    batch_for,
    decoder_batch,
    random_config,
    random_torch_model,
    run,
    torch_decoder,
    torch_logits,
    torch_outputs,
    transformers,
)
from tests.mlfs.test_hf_decoder_export import GPT2, SIZES

peft = pytest.importorskip("peft")


def randomised(lora, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype("float32"), lora)


@pytest.fixture
def load_base(tmp_path):
    """(family, own head, head to load) -> folder of a random base checkpoint, our model of it."""

    def load(family, own, head, **fixed):
        config = random_config(family, np.random.default_rng(3), num_labels=3, num_hidden_layers=2, **fixed)
        random_torch_model(family, own, config).save_pretrained(tmp_path / "base")
        labels = {"labels": 3} if head in ("sequence", "token") else {}
        return tmp_path / "base", load_checkpoint(tmp_path / "base", head=head, **labels)[0]

    return load


def check(model, lora, base, folder):
    """peft's logits are ours, and the adapter is active."""
    report = export_peft(model, lora, folder, base_model_name=str(base))
    labels = {"num_labels": model.config.labels} if model.config.labels else {}
    plain = getattr(transformers, AUTO[model.config.head]).from_pretrained(base, **labels)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    batch = batch_for(model.config, np.random.default_rng(0))
    logits, hidden = torch_outputs(theirs, batch)
    out = run(model, batch, lora)
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(out.hidden)[real], hidden[real], atol=TOLERANCE)
    if model.config.head != "none":
        where = real if logits.ndim == 3 else ...
        np.testing.assert_allclose(np.asarray(out.logits)[where], logits[where], atol=TOLERANCE)
    bare = run(model, batch)
    assert np.abs(np.asarray(bare.hidden) - np.asarray(out.hidden))[real].max() > 1e-2
    return report


@pytest.mark.parametrize(
    ("family", "own", "head"),
    [
        ("bert", "none", "sequence"),
        ("roberta", "mlm", "sequence"),
        ("distilbert", "none", "sequence"),
        ("electra", "none", "token"),
        ("bert", "mlm", "mlm"),
        ("roberta", "none", "none"),
    ],
)
def test_peft_gives_the_same_logits(family, own, head, load_base, tmp_path):
    base, model = load_base(family, own, head)
    full = ("head",) if head in ("sequence", "token") else ()
    first = randomised(init_lora(jax.random.key(0), model, rank=3, full=full), 1)
    second = randomised(init_lora(jax.random.key(1), model, rank=2, sites=["layers.q", "layers.down"]), 2)
    report = check(model, stack_stages([first, second]), base, tmp_path / "adapter")
    assert report.rank == 5 and len(report.target_modules) == len(lora_sites(model))
    if (family, head) == ("bert", "sequence"):
        assert report.modules_to_save == ("bert.pooler.dense", "classifier")


def test_a_language_model_gives_the_same_logits(tmp_path):
    torch_decoder("llama", SIZES).save_pretrained(tmp_path / "base")
    model, _ = load_checkpoint(tmp_path / "base")
    lora = randomised(init_lora(jax.random.key(0), model, rank=3), 1)
    export_peft(model, lora, tmp_path / "adapter", base_model_name=str(tmp_path / "base"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"
    batch = decoder_batch(np.random.default_rng(0), model.config.vocab_size)
    assert_equal_decoders(model.replace(base=merge_lora(model.base, lora)), theirs, batch)
    assert np.abs(np.asarray(run(model, batch).logits) - torch_logits(theirs, batch)).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "entries", "site", "says"),
    [
        ("phi3", SIZES, "layers.q", r"layers\.q has no module of its own in phi3.*qkv_proj"),
        ("phi3", SIZES, "layers.up", r"gate_up_proj"),
        ("gpt2", GPT2, "layers.k", r"c_attn holds several"),
        ("gpt2", GPT2, "layers.down", r"gpt2 stores layers\.down as \[in, out\]"),
    ],
)
def test_joined_and_turned_projections_are_refused(family, entries, site, says, tmp_path):
    model = init_model(from_hf({"model_type": family, "pad_token_id": 0} | entries, head="lm"), jax.random.key(0))
    with pytest.raises(ConfigError, match=says):
        export_peft(model, init_lora(jax.random.key(0), model, sites=[site]), tmp_path / "x", base_model_name="base")
    assert not (tmp_path / "x").exists()


def test_norms_trained_whole_and_an_untrained_head(load_base, tmp_path):
    base, model = load_base("bert", "none", "sequence")
    lora = randomised(init_lora(jax.random.key(0), model, rank=2, sites=["layers.v"], full=["layers.attn_norm"]), 1)
    report = check(model, lora, base, tmp_path / "adapter")
    assert "bert.encoder.layer.1.attention.output.LayerNorm" in report.modules_to_save
    assert "classifier" in report.modules_to_save


def test_what_peft_cannot_hold_is_refused(load_base, tmp_path):
    _, model = load_base("bert", "mlm", "mlm")
    lora = init_lora(jax.random.key(0), model, full=["head"])
    with pytest.raises(ConfigError, match="head is tied"):
        export_peft(model, lora, tmp_path / "x", base_model_name="base")
    lora = init_lora(jax.random.key(0), model, full=["layers.q"])
    with pytest.raises(ConfigError, match=r"layers\.q is both"):
        export_peft(model, lora, tmp_path / "x", base_model_name="base")
    sliced = model.replace(config=model.config.replace(head_dim=model.config.head_dim + 1))
    with pytest.raises(ConfigError, match="head_dim"):
        export_peft(sliced, lora, tmp_path / "x", base_model_name="base")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "file").write_text("")
    with pytest.raises(RunError, match="not an adapter"):
        export_peft(model, {}, tmp_path / "y", base_model_name="base")
    lora = init_lora(jax.random.key(0), model)
    for wrong, says in (
        ({}, "no low-rank pair"),
        ({"layers.foo": lora["layers.q"]}, r"adapter of another model: there is no layers\.foo\.kernel"),
        ({"layers.q": {"a": lora["layers.q"]["a"]}}, "half of a pair"),
        ({"layers.q": {leaf: value[:1] for leaf, value in lora["layers.q"].items()}}, r"has shape \(1, "),
    ):
        with pytest.raises(ConfigError, match=says):
            export_peft(model, wrong, tmp_path / "x", base_model_name="base")
    with pytest.raises(RunError, match="cannot make the folder"):
        export_peft(model, lora, tmp_path / "y" / "file" / "z", base_model_name="base")
    for _ in range(2):  # its own is written over
        export_peft(model, lora, tmp_path / "z", base_model_name="base")
    save_file({"theirs": np.ones(2)}, tmp_path / "z" / "adapter_model.safetensors")
    with pytest.raises(RunError, match="not an adapter of mlfs_jax"):
        export_peft(model, lora, tmp_path / "z", base_model_name="base")


def test_a_full_disk_leaves_the_earlier_adapter(load_base, tmp_path, monkeypatch):
    _, model = load_base("bert", "none", "sequence")
    lora = init_lora(jax.random.key(0), model)
    export_peft(model, lora, tmp_path / "x", base_model_name="base")
    before = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full"):
        export_peft(model, init_lora(jax.random.key(1), model), tmp_path / "x", base_model_name="base")
    assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == before
