"""Tokenizers through a GGUF and back: the same ids, the same text, the same files again."""

import json

import pytest
from tokenizers import Tokenizer

from mlfs_jax.config import DecoderConfig, Rope
from mlfs_jax.errors import CheckpointError
from mlfs_jax.hf.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files, tokenizer_metadata
from tests.mlfs.gguf_files import CHAT, TEXTS, byte_level_tokenizer, sentencepiece_tokenizer


def config(vocab_size, **fields):
    sizes = {"embed": 4, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4, "mlp": 4, "max_positions": 8}
    return DecoderConfig("llama", vocab_size=vocab_size, **sizes, rope=Rope(1e4, 4), **fields)


def built(meta, path):
    return Tokenizer.from_str(json.dumps(tokenizer_files(meta, path)["tokenizer.json"]))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level(pre, tmp_path):
    kind = {"ignore_merges": pre == "llama-bpe", "normalizer": {"type": "NFC"} if pre == "qwen2" else None}
    folder = byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS[pre], **kind)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = tokenizer_metadata(folder, config(410, bos_token_id=1, eos_token_ids=(2, 0)))
    assert (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert [meta[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")] == [1, 2, 0, 2]
    assert meta["tokenizer.chat_template"] == CHAT
    assert meta["tokenizer.ggml.add_bos_token"] is False
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3]
    assert [types[tokens.index(token)] for token in ("<think>", "the", "[PAD409]")] == [4, 1, 5]
    again = built(meta, folder)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert again.encode(text).ids == ids, text
        if pre != "qwen2":
            assert again.decode(ids, skip_special_tokens=False) == text
    files = tokenizer_files(meta, folder)
    said = files["tokenizer_config.json"]
    assert (said["bos_token"], said["eos_token"], said["chat_template"]) == ("<|im_start|>", "<|im_end|>", CHAT)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert tokenizer_metadata(folder, config(410, bos_token_id=1, eos_token_ids=(2, 0))) == meta


def test_digits_stand_alone_or_in_threes(tmp_path):
    """What tells the four cuts apart."""
    for pre, expected in (("smollm", 7), ("qwen2", 7), ("llama-bpe", 3), ("gpt-2", 1)):
        folder = byte_level_tokenizer(tmp_path / pre, PRE_TOKENIZERS[pre], ignore_merges=pre == "llama-bpe")
        pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer.pre_tokenize_str("1234567")
        assert len(pieces) == expected, pre


def test_sentencepiece(tmp_path):
    folder = sentencepiece_tokenizer(tmp_path / "t")
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = tokenizer_metadata(folder, config(original.get_vocab_size()))
    assert meta["tokenizer.ggml.model"] == "llama"
    assert (meta["tokenizer.ggml.add_bos_token"], meta["tokenizer.ggml.add_space_prefix"]) == (True, True)
    assert (meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.unknown_token_id"]) == (1, 0)
    assert meta["tokenizer.ggml.token_type"][:3] == [2, 3, 3]
    assert meta["tokenizer.ggml.token_type"].count(6) == 256
    again = built(meta, folder)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert ids[0] == 1
        assert again.encode(text).ids == ids, text
        assert again.decode(ids) == original.decode(ids) == text


def test_what_a_folder_must_have(tmp_path):
    with pytest.raises(CheckpointError, match="the model comes with no tokenizer"):
        tokenizer_metadata(None, config(10))
    with pytest.raises(CheckpointError, match=r"tokenizer_from, a folder with tokenizer\.json"):
        tokenizer_metadata(tmp_path, config(10))
    (tmp_path / "tokenizer.json").write_text("{oops")
    with pytest.raises(CheckpointError, match="is damaged"):
        tokenizer_metadata(tmp_path, config(10))
    folder = byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS["gpt-2"])
    last = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() - 1
    with pytest.raises(CheckpointError, match=f"a token of id {last}; the model has {last} rows"):
        tokenizer_metadata(folder, config(last))
    byte_level_tokenizer(tmp_path / "t", {"type": "Whitespace"})
    with pytest.raises(CheckpointError, match=r'no name here: {"type": "Whitespace"}; named are gpt-2, smollm'):
        tokenizer_metadata(folder, config(400))
    byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS["gpt-2"], normalizer={"type": "Lowercase"})
    with pytest.raises(CheckpointError, match="a GGUF cannot express this tokenizer"):
        tokenizer_metadata(folder, config(400))
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(CheckpointError, match="of the kind 'Unigram'"):
        tokenizer_metadata(folder, config(400))


def test_chat_template_in_its_own_file(tmp_path):
    folder = byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS["gpt-2"])
    said = json.loads((folder / "tokenizer_config.json").read_text())
    del said["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert "tokenizer.chat_template" not in tokenizer_metadata(folder, config(400))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_metadata(folder, config(400))["tokenizer.chat_template"] == "{{ messages }}"


def test_bos_and_eos_are_added(tmp_path):
    folder = byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS["gpt-2"])
    meta = tokenizer_metadata(folder, config(400, bos_token_id=1, eos_token_ids=(2,)))
    meta |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    again = built(meta, folder)
    assert again.encode("a").ids[::2] == [1, 2]
    assert [again.encode("a", "b").ids[i] for i in (0, 2, 3, 5)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": None}, "has no tokenizer"),
        ({"tokenizer.ggml.tokens": []}, "has no tokenizer"),
        ({"tokenizer.ggml.model": "t5"}, "of the kind 't5'; read here are 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "cuts text as 'tekken'; known here are gpt-2, smollm"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "400 tokens and 1 token types"),
        ({"tokenizer.ggml.bos_token_id": 400}, "bos_token_id = 400, of 400 tokens"),
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.unknown_token_id": 900}, "unknown_token_id = 900, of 400 tokens"),
        ({"tokenizer.ggml.bos_token_id": "<s>"}, "bos_token_id = '<s>', of 400 tokens"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges is no list of str"),
        ({"tokenizer.ggml.token_type": 1}, "tokenizer.ggml.token_type is no list of int"),
        ({"tokenizer.ggml.scores": ["a"] * 400}, "tokenizer.ggml.scores is no list of float"),
        ({"tokenizer.ggml.pre": ["a"]}, "cuts text as"),
    ],
)
def test_what_a_file_must_have(change, words, tmp_path):
    folder = byte_level_tokenizer(tmp_path / "t", PRE_TOKENIZERS["gpt-2"])
    meta = tokenizer_metadata(folder, config(400)) | change
    with pytest.raises(CheckpointError, match=words):
        tokenizer_files({key: value for key, value in meta.items() if value is not None}, tmp_path)
