"""GGUF files written: read back equal, quantised to the bit of the format, and what cannot be written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax import published
from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Rope
from mlfs_jax.errors import CheckpointError, ConfigError, RunError
from mlfs_jax.hf.gguf import permute, prepare_folder, read_gguf, unpermute
from mlfs_jax.hf.gguf_file import open_gguf
from mlfs_jax.hf.gguf_tokenizer import PRE_TOKENIZERS
from mlfs_jax.hf.gguf_write import export_gguf
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.info import describe
from mlfs_jax.model import build, forward
from mlfs_jax.registry import MANIFEST, get_entry
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet
from tests.mlfs.gguf_files import CHAT, byte_level_tokenizer, decode_block
from tests.mlfs.tiny import tiny_decoder

SIZES = {"vocab_size": 405, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "bos_token_id": 1}
SIZES |= {"rope": Rope(10_000.0, 16), "eos_token_ids": (2, 0, 1), "pad_token_id": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_level_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer", PRE_TOKENIZERS["smollm"])


def tiny_llama(tokenizer, **changes):
    return tiny_decoder("llama", **{**SIZES, **changes}).replace(source=tokenizer)


def arrays(model):
    return {name: np.asarray(leaf[...]) for name, leaf in flatten(model.base).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "layers": 1, "kv_heads": 4},
        {"family": "qwen2", "qkv_bias": True},
        {"family": "qwen2", "qkv_bias": True, "embed": 64},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"rope": Rope(5e5, 16, scaling="linear", factor=2.0)},
        {"rope": Rope(1e4, 16, scaling="yarn", factor=4.0, original_positions=8, beta_fast=20.0, attention_factor=1.5)},
        {"head_dim": 64, "rope": Rope(5e5, 64, scaling="llama3", factor=32.0, original_positions=8192)},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_f32_comes_back_equal(changes, tokenizer, tmp_path):
    model = tiny_llama(tokenizer, **changes)
    report = export_gguf(model, tmp_path / "m.gguf", "f32", name="tiny")
    again = read_gguf(tmp_path / "m.gguf")
    rope, expected = again.config.rope, model.config.rope
    if expected.attention_factor is not None:
        assert rope.attention_factor == pytest.approx(expected.attention_factor)
        again = again.replace(config=again.config.replace(rope=expected))
    assert again.config == model.config
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(arrays(again)[name], value, err_msg=name)
    assert report.types.keys() == {"F32"}
    heads_fill_embed = model.config.heads * model.config.head_dim == model.config.embed
    assert report.architecture == ("qwen2" if "family" in changes and heads_fill_embed else "llama")
    assert (report.fallbacks, report.why, report.parameters) == ({}, (), model.num_params)
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    meta = open_gguf(tmp_path / "m.gguf").metadata
    assert (meta["general.name"], meta["general.file_type"], meta["general.type"]) == ("tiny", 0, "model")
    json.dumps(report.to_json())


def test_a_gguf_of_the_catalogue_is_planned_and_described(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path))
    entry, model = get_entry("smollm2-135m"), tiny_llama(tokenizer)
    entry.cached.mkdir()
    file = entry.cached / entry.files[0]
    export_gguf(model, file, "f32", name="tiny")
    manifest = {"sha256": entry.sha256, "files": {file.name: {"size": file.stat().st_size}}}
    (entry.cached / MANIFEST).write_text(json.dumps(manifest))
    assert published.config_of(entry.name) == published.config_of(str(file)) == model.config
    described = describe(entry.name)
    assert described["parameters"]["total"] == model.num_params and described["config"]["layers"] == 3


def test_every_dtype(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    half = {"f16": np.float16, "bf16": jnp.bfloat16}
    for dtype in ("f16", "bf16", "q8_0"):
        report = export_gguf(model, tmp_path / f"{dtype}.gguf", dtype)
        found = arrays(read_gguf(tmp_path / f"{dtype}.gguf"))
        for name, value in arrays(model).items():
            if name.endswith("scale"):
                expected = value
            elif dtype in half:
                expected = value.astype(half[dtype]).astype(np.float32)
            elif name == "layers.v.kernel":
                expected = value.astype(np.float16).astype(np.float32)
            else:
                expected = value
                assert 0 < np.abs(found[name] - value).max() < np.abs(value).max() / 200
                continue
            np.testing.assert_array_equal(found[name], expected, err_msg=f"{dtype} {name}")
        assert (
            report.types
            == {
                "f16": {"F16": 23, "F32": 7},
                "bf16": {"BF16": 23, "F32": 7},
                "q8_0": {"Q8_0": 20, "F16": 3, "F32": 7},
            }[dtype]
        )


def test_q8_0_blocks_are_the_nearest(tokenizer, tmp_path):
    """Half a step of amax / 127 at most, each block of 32 by itself."""
    model = tiny_llama(tokenizer)
    export_gguf(model, tmp_path / "m.gguf", "q8_0")
    file = open_gguf(tmp_path / "m.gguf")
    place = file.tensors["blk.1.ffn_gate.weight"]
    raw = np.fromfile(file.path, np.uint8, place.nbytes, offset=place.offset).reshape(-1, 34)
    found = np.array([decode_block("Q8_0", block.tobytes()) for block in raw])
    weights = arrays(model)["layers.gate.kernel"][1].T.reshape(-1, 32)
    step = np.abs(weights).max(1, keepdims=True) / 127
    assert (np.abs(found - weights) <= 0.51 * step + 1e-3 * np.abs(weights)).all()


def test_rows_that_are_no_multiple_of_32_stay_f16(tokenizer, tmp_path):
    model = tiny_llama(tokenizer, mlp=40)
    report = export_gguf(model, tmp_path / "m.gguf", "q8_0")
    down = {f"blk.{i}.ffn_down.weight" for i in range(3)}
    assert down < report.fallbacks.keys()
    assert set(report.fallbacks.values()) == {"F16"}
    assert "3 matrices are F16, not Q8_0: their rows of 40 are no multiple of 32." in report.why
    assert report.why[1:] == ("attn_v is F16, not Q8_0: several heads share it.",)
    plain = export_gguf(model, tmp_path / "m.gguf", "q8_0", values_f16=False)
    assert (plain.fallbacks.keys(), len(plain.why)) == (down, 1)
    np.testing.assert_array_equal(
        arrays(read_gguf(report.path))["layers.down.kernel"],
        arrays(model)["layers.down.kernel"].astype(np.float16).astype(np.float32),
    )


def test_a_slice_of_another_head_size(tokenizer, tmp_path):
    """heads * head_dim is not embed; ragged layers are padded to the widest."""
    model = tiny_llama(tokenizer)
    subnet = Subnet(embed=24, heads=(2, 4), mlp=(32, 64), layers=(0, 2))
    sliced = slice_subnet(model, subnet)
    export_gguf(sliced, tmp_path / "m.gguf", "f32")
    again = read_gguf(tmp_path / "m.gguf")
    assert again.config == sliced.config
    assert (again.config.embed, again.config.heads * again.config.head_dim) == (24, 64)
    batch = {"input_ids": np.arange(10)[None]}
    same = [forward(m.graphdef, m.base, batch).logits for m in (sliced, again)]
    np.testing.assert_array_equal(*same)


def test_permutation_is_llama_cpps():
    """convert_hf_to_gguf.py, LlamaModel.permute: row 2i + j of a head is row j * H/2 + i of Hugging Face's."""
    rows = np.arange(3 * 8 * 2).reshape(24, 2)
    theirs = permute(rows, 3)
    for head in range(3):
        for i in range(4):
            for j in range(2):
                np.testing.assert_array_equal(theirs[8 * head + 2 * i + j], rows[8 * head + 4 * j + i])
    np.testing.assert_array_equal(unpermute(theirs, 3), rows)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bloom", {}, "family 'bloom' is not written here; llama, mistral, qwen2"),
        ("llama", {"windows": (4, 0, 4)}, r"cannot express windows = \(4, 0, 4\)"),
        ("llama", {"qk_norm": "head"}, "qk_norm = 'head'"),
        ("llama", {"activation": "gelu", "logit_softcap": 3.0}, "activation = 'gelu'|logit_softcap = 3.0"),
        ("llama", {"attn_scale": 0.5}, "attn_scale = 0.5"),
        ("llama", {"rope": Rope(1e4, 8)}, "turns whole heads"),
        ("llama", {"rope": Rope(1e4, 16, interleaved=True)}, "first half with second"),
        ("llama", {"head": "none"}, "head = 'none'"),
        ("llama", {"family": "qwen2"}, "qkv_bias = False"),
    ],
)
def test_what_llama_cpp_cannot_express(kind, changes, words, tokenizer, tmp_path):
    model = tiny_decoder(kind, **({**SIZES, **changes} if kind == "llama" else {}))
    with pytest.raises(ConfigError, match=words):
        export_gguf(model.replace(source=tokenizer), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_same_by_another_name(tokenizer, tmp_path):
    """What changes nothing is no obstacle: the scale of the default, windows that see all, Mistral's name."""
    model = tiny_llama(tokenizer, family="mistral", attn_scale=0.25, windows=(0, 0, 0))
    export_gguf(model, tmp_path / "m.gguf", "f32")
    assert read_gguf(tmp_path / "m.gguf").config.family == "llama"


def test_bad_requests(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    with pytest.raises(ConfigError, match="dtype = 'q4_0'"):
        export_gguf(model, tmp_path / "m.gguf", "q4_0")
    with pytest.raises(CheckpointError, match="comes with no tokenizer"):
        export_gguf(model.replace(source=None), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        export_gguf(model, tmp_path / "m.gguf", tokenizer_from=tmp_path)
    weights = arrays(model)
    weights["layers.up.kernel"] = weights["layers.up.kernel"].copy()
    weights["layers.up.kernel"][1, 0, 0] = 1e5
    large = build(model.config, {name: jnp.asarray(w) for name, w in weights.items()}, source=tokenizer)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight has weights up to 100000, too large for F16"):
        export_gguf(large, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir()), "nothing half written stays"
    export_gguf(large, tmp_path / "m.gguf", "bf16")


def test_only_an_export_is_replaced(tokenizer, tmp_path):
    model, path = tiny_llama(tokenizer), tmp_path / "new" / "m.gguf"
    first = export_gguf(model, path)
    assert export_gguf(model, path, "f32").nbytes > first.nbytes
    assert [file.name for file in path.parent.iterdir()] == ["m.gguf"]
    for content in (b"mine", path.read_bytes().replace(b"mlfs_jax.export", b"mlfs_jax.exporT")):
        path.write_bytes(content)
        with pytest.raises(RunError, match="is not an export"):
            export_gguf(model, path)
        assert path.read_bytes() == content


def test_there_and_back_through_a_folder(tokenizer, tmp_path, monkeypatch):
    """from_pretrained of a file, of the folder around it, and of the folder that is prepared from it."""
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(tokenizer)
    export_gguf(model, tmp_path / "out" / "m.gguf", "f32")
    found = [from_pretrained(place) for place in (tmp_path / "out" / "m.gguf", tmp_path / "out")]
    found.append(from_pretrained(found[0].source))
    for again in found:
        assert again.config == model.config
        for name, value in arrays(model).items():
            np.testing.assert_array_equal(arrays(again)[name], value, err_msg=name)
    folder = found[0].source
    assert folder == prepare_folder(tmp_path / "out" / "m.gguf")
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == CHAT
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", [2, 0, 1])
    assert not list(folder.parent.glob(".tmp-*"))
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(RunError, match=r"could not be made.*MLFS_CACHE"):
        prepare_folder(folder / "model.gguf", cache=tmp_path / "full")
    again = export_gguf(found[0], tmp_path / "again.gguf", "f32", name="model")
    assert open_gguf(again.path).header == open_gguf(tmp_path / "out" / "m.gguf").header
