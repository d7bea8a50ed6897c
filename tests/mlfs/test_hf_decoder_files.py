"""Files of decoders: heads, tied and joined tensors, buffers, shards, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.errors import CheckpointError
from mlfs_jax.hf.export import export_hf
from mlfs_jax.hf.load import load_checkpoint
from tests.mlfs.hf_oracle import assert_equal_decoders, decoder_batch, decoder_sizes, torch_decoder, transformers

SIZES = decoder_sizes(np.random.default_rng(3)) | {"pad_token_id": 0}
GPT2 = {
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 31,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENTRIES = {"llama": SIZES, "phi": SIZES, "phi3": SIZES, "gpt_neox": SIZES | {"rotary_pct": 1.0}, "gpt2": GPT2,
           "gpt_bigcode": GPT2, "stablelm": SIZES | {"partial_rotary_factor": 1.0, "qk_layernorm": True}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family, tied -> folder of a small language model that transformers wrote, made once."""
    made = {}

    def folder(family, tied=False):
        if (family, tied) not in made:
            made[family, tied] = tmp_path_factory.mktemp(family)
            torch_decoder(family, ENTRIES[family] | {"tie_word_embeddings": tied}).save_pretrained(made[family, tied])
        return made[family, tied]

    return folder


def changed(source, folder, tensors=None, **entries):
    """A copy of a checkpoint with other tensors or other entries in config.json."""
    hf = json.loads((source / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(load_file(source / "model.safetensors") if tensors is None else tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_base_models_and_language_models_load_as_each_other(family, tied, folders, tmp_path):
    """Hidden states of a language model are its base model's; a base model gets a new head, or the token table."""
    source = folders(family, tied)
    theirs = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    hidden, report = load_checkpoint(source, head="none")
    batch = decoder_batch(np.random.default_rng(0), hidden.config.vocab_size)
    assert_equal_decoders(hidden, theirs, batch)
    assert len(report.dropped) == (0 if tied else 1)
    theirs.save_pretrained(tmp_path / "base")
    base, report = load_checkpoint(tmp_path / "base")
    assert base.config == hidden.config and (report.dropped, report.initialised) == ((), ())
    _, report = load_checkpoint(tmp_path / "base", head="lm")
    assert report.initialised == (() if tied else ("head.kernel",))
    export_hf(base, tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


def test_a_classifier_gives_its_backbone(folders, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folders("llama"), num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    _, report = load_checkpoint(tmp_path, head="none")
    assert report.dropped == ("score.weight",)
    _, report = load_checkpoint(tmp_path, head="lm")
    assert report.dropped == ("score.weight",) and report.initialised == ("head.kernel",)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_a_tied_head_may_be_there_if_it_is_the_same(family, folders, tmp_path):
    source = folders(family, True)
    tensors, table = load_file(source / "model.safetensors"), "embed_in" if family == "gpt_neox" else "embed_tokens"
    head = next(value for key, value in tensors.items() if table in key).copy()
    model, report = load_checkpoint(changed(source, tmp_path, tensors | {"lm_head.weight": head}))
    assert model.config.tied and report.dropped == ()
    head[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*differs.*tie_word_embeddings = false"):
        load_checkpoint(changed(source, tmp_path, tensors | {"lm_head.weight": head}))
    model, _ = load_checkpoint(changed(source, tmp_path, tensors | {"lm_head.weight": head}, tie_word_embeddings=False))
    np.testing.assert_array_equal(flatten(model.base)["head.kernel"][...], head.T)
    with pytest.raises(CheckpointError, match=r"lacks (lm_head|embed_out)\.weight"):
        load_checkpoint(changed(source, tmp_path, tensors, tie_word_embeddings=False))


def test_old_names_and_buffers_are_known(folders, tmp_path):
    source = folders("gpt_neox")
    tensors = load_file(source / "model.safetensors")
    assert "embed_out.weight" in tensors
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    for i in range(2):
        tensors |= {f"gpt_neox.layers.{i}.attention.bias": np.ones((1, 1, 4, 4), bool),
                    f"gpt_neox.layers.{i}.attention.masked_bias": np.array(-1e9, np.float32),
                    f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": np.ones(2, np.float32)}  # fmt: skip
    model, report = load_checkpoint(changed(source, tmp_path, tensors))
    assert report.dropped == ()
    np.testing.assert_array_equal(flatten(model.base)["head.kernel"][...], tensors["lm_head.weight"].T)
    with pytest.raises(CheckpointError, match="twice"):
        load_checkpoint(changed(source, tmp_path, tensors | {"embed_out.weight": tensors["lm_head.weight"].copy()}))
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(folders("gpt2", True) /
               "model.safetensors").items()} | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}  # fmt: skip
    load_checkpoint(changed(folders("gpt2", True), tmp_path, tensors))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn.bias"),
        ("stablelm", "model.layers.1.self_attn.q_layernorm.norms.0.weight"),
    ],
)
def test_joined_tensors_are_as_strict_as_others(family, key, folders, tmp_path):
    tensors = load_file(folders(family) / "model.safetensors")
    for change, words in (
        ({key: tensors[key][:-1].copy()}, ("has shape", str(tensors[key].shape))),
        ({key + "x": tensors[key].copy()}, ("no " + family,)),
        ({key: tensors[key].astype(np.int8)}, ("holds I8",)),
    ):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(changed(folders(family), tmp_path, tensors | change))
        assert all(word in str(error.value) for word in (key, *words))
    del tensors[key]
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        load_checkpoint(changed(folders(family), tmp_path, tensors))


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_bigcode"])
def test_shards_half_precision_and_placement(family, folders, tmp_path):
    source = folders(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    theirs.save_pretrained(tmp_path / "a", max_shard_size="3KB")
    seen, device = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(axes, shape):
        seen[axes] = shape
        return device

    half, report = load_checkpoint(tmp_path / "a", dtype=jnp.bfloat16, sharding=place)
    assert len(report.files) > 2 and ("layers", "embed", "kv_heads", "head_dim") in seen
    export_hf(half, tmp_path / "b", max_shard_bytes=3000)
    tensors = [{}, {}]
    for i, folder in enumerate("ab"):
        for file in (tmp_path / folder).glob("*.safetensors"):
            tensors[i] |= load_file(file)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    full, _ = load_checkpoint(tmp_path / "b")
    again = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager").float().eval()
    )
    assert_equal_decoders(full, again, decoder_batch(np.random.default_rng(0), full.config.vocab_size))
