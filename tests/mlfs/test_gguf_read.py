"""GGUF files read: every tensor type against a decoder of its own, shapes, rope scalings, and what is refused."""

import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Rope
from mlfs_jax.errors import CheckpointError, ConfigError
from mlfs_jax.hf.gguf import config_of, gguf_in, prepare_folder, read_gguf
from mlfs_jax.hf.gguf_file import READABLE, open_gguf
from mlfs_jax.hf.gguf_rope import llama3_factors, llama3_rope
from mlfs_jax.hf.load import from_pretrained, load_checkpoint
from tests.mlfs.gguf_files import BLOCKS, LLAMA, decode_block, llama_tensors, random_blocks, write_gguf


@pytest.fixture
def llama(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", LLAMA, llama_tensors())


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_as_the_format_says(kind, tmp_path):
    raw = random_blocks(kind, rows=3, blocks=2)
    file = write_gguf(tmp_path / "t.gguf", {}, {"a": np.zeros(3, np.float32), "x": (kind, raw)})
    expected = [decode_block(kind, a.tobytes()) + decode_block(kind, b.tobytes()) for a, b in raw.reshape(3, 2, -1)]
    np.testing.assert_allclose(open_gguf(file).read("x"), np.float32(expected), rtol=1e-5, atol=1e-5)


def test_every_readable_type_is_tested():
    assert {*READABLE} == {*BLOCKS, "F32", "F16", "BF16"}


def test_float_types(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (3, 5)).astype(np.float32)
    rounded = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    brain = ("BF16", (rounded.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    file = open_gguf(write_gguf(tmp_path / "t.gguf", {}, {"f32": x, "f16": x.astype(np.float16), "bf16": brain}))
    assert [tensor.type for tensor in file.tensors.values()] == ["F32", "F16", "BF16"]
    for name, expected in (("f32", x), ("f16", x.astype(np.float16)), ("bf16", rounded)):
        np.testing.assert_array_equal(file.read(name), expected)


def test_metadata_of_every_kind(tmp_path):
    meta = {"a": "ünï", "b": True, "c": 7, "d": 0.5, "e": ["x", ""], "f": [1, -2], "g": [0.25], "h": [True, False]}
    found = open_gguf(write_gguf(tmp_path / "t.gguf", meta, {"x": np.zeros(1, np.float32)})).metadata
    assert found == {"general.architecture": "llama", **meta}


def test_weights_and_shape(llama):
    model, tensors = read_gguf(llama), llama_tensors()
    config = model.config
    assert (config.family, config.vocab_size, config.embed, config.layers) == ("llama", 10, 8, 1)
    assert (config.heads, config.kv_heads, config.head_dim, config.mlp, config.max_positions) == (2, 1, 4, 12, 32)
    assert (config.rope, config.norm_eps, config.tied) == (Rope(10_000.0, 4), 1e-5, True)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    flat = {name: np.asarray(leaf[...]) for name, leaf in flatten(model.base).items()}
    np.testing.assert_array_equal(flat["embed.tokens.table"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(flat["layers.down.kernel"][0], tensors["blk.0.ffn_down.weight"].T)
    for name, heads in (("q", 2), ("k", 1), ("v", 1)):
        theirs = tensors[f"blk.0.attn_{name}.weight"].reshape(heads, 4, 8)
        order = (0, 1, 2, 3) if name == "v" else (0, 2, 1, 3)  # pairs side by side: (0, 1), (2, 3) are (0, 2), (1, 3)
        np.testing.assert_array_equal(flat[f"layers.{name}.kernel"][0], theirs[:, order].transpose(2, 0, 1))


def test_dtype_and_head(llama):
    model = read_gguf(llama, head="none", dtype=jnp.bfloat16)
    assert model.config.head == "none"
    assert {leaf[...].dtype for leaf in flatten(model.base).values()} == {jnp.dtype("bfloat16")}
    with pytest.raises(ConfigError, match="'lm' or 'none'"):
        read_gguf(llama, head="mlm")
    with pytest.raises(ConfigError, match="labels = 3"):
        load_checkpoint(llama, labels=3)
    with pytest.raises(ConfigError, match=r"small is a language model \(GGUF\): to label texts .* an encoder"):
        load_checkpoint(llama, head="sequence", labels=3, name="small")


def test_untied_head_and_qwen2_biases(tmp_path):
    tensors = llama_tensors() | {"output.weight": np.ones((10, 8), np.float32)}
    assert not read_gguf(write_gguf(tmp_path / "untied.gguf", LLAMA, tensors)).config.tied
    assert read_gguf(tmp_path / "untied.gguf", head="none").config.head == "none"

    meta = {key.replace("llama.", "qwen2."): value for key, value in LLAMA.items()} | {"general.architecture": "qwen2"}
    tensors = llama_tensors() | {
        f"blk.0.attn_{n}.bias": np.full(size, i, np.float32)
        for i, (n, size) in enumerate((("q", 8), ("k", 4), ("v", 4)))
    }
    model = read_gguf(write_gguf(tmp_path / "qwen2.gguf", meta, tensors))
    assert (model.config.family, model.config.qkv_bias) == ("qwen2", True)
    q = flatten(model.base)["layers.q.kernel"][...][0]
    np.testing.assert_array_equal(q.reshape(8, 8).T, tensors["blk.0.attn_q.weight"])  # not permuted
    assert (np.asarray(flatten(model.base)["layers.v.bias"][...]) == 2).all()


def scaled(tmp_path, tensors=(), **scaling):
    meta = LLAMA | {f"llama.rope.{key.replace('__', '.')}": value for key, value in scaling.items()}
    file = write_gguf(tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf", meta, llama_tensors() | dict(tensors))
    return config_of(open_gguf(file)).rope


def test_rope_scalings(tmp_path):
    assert scaled(tmp_path, freq_base=5e5) == Rope(5e5, 4)
    assert scaled(tmp_path, scaling__type="none", scaling__factor=4.0) == Rope(1e4, 4)
    assert scaled(tmp_path, scaling__type="linear", scaling__factor=4.0) == Rope(1e4, 4, scaling="linear", factor=4.0)
    assert scaled(tmp_path, scale_linear=2.0) == Rope(1e4, 4, scaling="linear", factor=2.0)
    yarn = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 8}
    expected = {"scaling": "yarn", "factor": 4.0, "original_positions": 8}
    assert scaled(tmp_path, **yarn) == Rope(1e4, 4, **expected)
    yarn |= {"scaling__yarn_beta_fast": 16.0}
    rope = scaled(tmp_path, **yarn, scaling__attn_factor=0.5)
    assert rope.beta_fast == 16.0
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    assert scaled(tmp_path, **yarn, scaling__yarn_attn_factor=0.5).attention_factor == 0.5
    with pytest.raises(ConfigError, match=r"longrope.*linear, yarn and llama3"):
        scaled(tmp_path, scaling__type="longrope")
    with pytest.raises(CheckpointError, match=r"scaling\.factor = 'much': expected a number"):
        scaled(tmp_path, scaling__factor="much")
    with pytest.raises(ConfigError, match="yarn_ext_factor"):
        scaled(tmp_path, **yarn, scaling__yarn_ext_factor=0.5)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(5e5, 128, scaling="llama3", factor=8.0, original_positions=8192),
        Rope(5e5, 64, scaling="llama3", factor=32.0, original_positions=8192),
        Rope(1e4, 64, scaling="llama3", factor=4.0, original_positions=2048, high_freq=8.0),
    ],
)
def test_llama3_scaling_is_found_in_its_factors(rope):
    factors = llama3_factors(rope).astype(np.float32).astype(np.float64)
    assert llama3_rope(factors, Rope(rope.theta, rope.dim)) == rope


def test_rope_freqs(tmp_path):
    ones = {"rope_freqs.weight": np.ones(2, np.float32)}
    assert scaled(tmp_path, ones) == Rope(1e4, 4)
    with pytest.raises(ConfigError, match="no Llama 3 rope scaling"):
        scaled(tmp_path, {"rope_freqs.weight": np.array([3, 1], np.float32)})
    with pytest.raises(ConfigError, match="3 entries"):
        scaled(tmp_path, {"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(ConfigError, match=r"rope_freqs.weight and rope scaling 'linear'"):
        scaled(tmp_path, ones, scaling__factor=2.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"general.architecture": "gemma"}, ConfigError, "'gemma'; read here are llama, qwen2"),
        ({"general.architecture": "qwen3"}, ConfigError, "nearest: 'qwen2'"),
        ({"llama.expert_count": 8}, ConfigError, "llama.expert_count = 8"),
        ({"llama.attention.causal": False}, ConfigError, "an encoder"),
        ({"llama.feed_forward_length": [12, 14]}, ConfigError, "differs between layers"),
        ({"llama.rope.dimension_count": 2}, ConfigError, "rope.dimension_count is not the head size 4"),
        ({"llama.context_length": "long"}, CheckpointError, "context_length = 'long'"),
        ({"llama.attention.head_count": 0}, CheckpointError, "0 heads"),
        ({"llama.embedding_length": 16}, CheckpointError, "its metadata make it"),
        ({"llama.block_count": 2}, CheckpointError, r"lacks blk.1.attn_k.weight, .*\(9 in all\)"),
    ],
)
def test_metadata_that_cannot_be_built(change, error, words, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", LLAMA | change, llama_tensors())
    with pytest.raises(error, match=words):
        read_gguf(file)


def test_strange_and_missing_tensors(tmp_path):
    tensors = llama_tensors()
    strange = tensors | {"blk.0.attn_qkv.weight": tensors["blk.0.attn_q.weight"]}
    with pytest.raises(CheckpointError, match=r"not built here: blk.0.attn_qkv.weight"):
        read_gguf(write_gguf(tmp_path / "strange.gguf", LLAMA, strange))
    for name in ("token_embd.weight", "blk.0.ffn_up.weight"):
        lacking = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=f"lacks.*{name}"):
            read_gguf(write_gguf(tmp_path / f"{name}.gguf", LLAMA, lacking))


def test_unknown_tensor_types(tmp_path):
    file = write_gguf(tmp_path / "t.gguf", LLAMA, llama_tensors() | {"x": ("IQ4_NL", np.zeros((1, 18), np.uint8))})
    with pytest.raises(CheckpointError, match=r"tensor x is of type IQ4_NL; read here are F32, F16"):
        read_gguf(file)
    data = bytearray(file.read_bytes())
    at = data.rindex(b"\x01\x00\x00\x00\x00\x00\x00\x00x") + 9 + 4 + 16  # after its name, axes and sizes
    data[at : at + 4] = (999).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="of type number 999"):
        read_gguf(file)


def test_not_a_gguf(tmp_path, llama):
    other = tmp_path / "other.gguf"
    for content, words in (
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 something else", "not a GGUF file: it starts with"),
        (b"GGUF", "cut short"),
        (llama.read_bytes()[:4] + b"\x01\0\0\0" + bytes(30), "GGUF version 1"),
        (llama.read_bytes()[:4] + b"\0\0\0\x03" + bytes(30), "big-endian"),
    ):
        other.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read_gguf(other)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def test_cut_short_anywhere(tmp_path, llama):
    data = llama.read_bytes()
    header = len(open_gguf(llama).header)
    for size in [*range(8, header, 13), header, header + 40, len(data) // 2, len(data) - 33]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is cut short: it ends"):
            read_gguf(cut)


def test_damaged_header(tmp_path, llama):
    """A flipped byte is an error of ours or another number, never a crash of another kind."""
    data, rng = llama.read_bytes(), np.random.default_rng(0)
    file, refused = tmp_path / "flipped.gguf", 0
    for at in rng.choice(len(open_gguf(llama).header), 150, replace=False):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        try:
            read_gguf(file)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 50


def test_a_part_of_a_model(tmp_path):
    part = write_gguf(tmp_path / "m-00001-of-00002.gguf", LLAMA | {"split.count": 2}, llama_tensors())
    with pytest.raises(CheckpointError, match="is one of 2 parts of a model: join them"):
        read_gguf(part)


def test_arrays_of_arrays_without_end(tmp_path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    (tmp_path / "deep.gguf").write_bytes(header + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(CheckpointError, match="arrays of arrays of arrays without end"):
        open_gguf(tmp_path / "deep.gguf")


def test_which_file(tmp_path, llama):
    assert gguf_in(llama) == llama
    assert gguf_in(tmp_path) == llama
    assert gguf_in(tmp_path / "nowhere") is None
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 GGUF files, second.gguf, tiny.gguf"):
        gguf_in(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_in(tmp_path) is None


def test_tokenizer_missing(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        from_pretrained(llama)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        prepare_folder(llama)
    assert not list((tmp_path / "cache" / "gguf").glob("*")), "nothing half made stays"
