"""Small GGUF files, tokenizers, and block decoders written from the format's description, for the tests of GGUF."""

import json
import struct

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from mlfs_jax.hf.gguf_tokenizer import PROBES

CORPUS = [
    "the cat sat on the mat, don't you think 12345 they'll see",
    "def f(x):\n    return x ** 2  # ünïcödé",
    "日本 🚀",
]
TEXTS = (
    *PROBES,
    "",
    " ",
    "a",
    "the cat<|im_end|> sat",
    "\n\n\n x",
    "I'VE I've don't",
    "1234567 12 ٣½",
    "<think>ok",
    "日本",
)
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 32,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def llama_tensors(seed=0):
    """Name -> float32 array of a llama of LLAMA's sizes, 10 tokens."""
    shapes = {"token_embd": (10, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8)}
    shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path, meta, tensors):
    """A file by the gguf package; a tensor is a float array, or (type name, raw bytes [rows, bytes a row])."""
    meta = dict(meta)
    writer = GGUFWriter(path, meta.pop("general.architecture", "llama"))
    for key, value in meta.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=GGMLQuantizationType[value[0]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tokenizer(folder, pre_tokenizer, *, ignore_merges=False, normalizer=None):
    """A folder with a byte-level BPE of 400 tokens, four of them added, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as tokenizer_decoders

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=399, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"], spec["normalizer"] = pre_tokenizer, normalizer
    spec["model"]["ignore_merges"] = ignore_merges
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHAT}
    return _save(folder, spec, config)


def sentencepiece_tokenizer(folder):
    """A folder with a BPE of bytes and pieces, as Llama 2's: spaces are ▁, one in front; BOS is added."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from tokenizers import decoders as tokenizer_decoders

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    tokenizer.train_from_iterator([f"▁{w}" for text in CORPUS[:2] * 4 for w in text.split()], trainer)
    spec = json.loads(tokenizer.to_str())
    first = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = tokenizer_decoders.Sequence(
        [
            tokenizer_decoders.Replace("▁", " "),
            tokenizer_decoders.ByteFallback(),
            tokenizer_decoders.Fuse(),
            tokenizer_decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(folder, json.loads(tokenizer.to_str()), config)


def _save(folder, spec, config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
"""Bytes of a block."""


def random_blocks(kind, rows, blocks, seed=0):
    """[rows, bytes]: any bits, but the float16 scales of each block are between 0.01 and 1."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCKS[kind]), np.uint8)
    scales = rng.uniform(0.01, 1, (rows, blocks, 2)).astype("<f2").view(np.uint8)
    if kind == "Q6_K":
        raw[..., 208:] = scales[..., :2]
    else:
        raw[..., : 4 if kind[-1] in "1K" else 2] = scales[..., : 4 if kind[-1] in "1K" else 2]
    return raw.reshape(rows, -1)


def decode_block(kind, raw):
    """The numbers of one block, one at a time (ggml-quants.c, dequantize_row_*)."""
    half = lambda at: struct.unpack("<e", raw[at : at + 2])[0]  # noqa: E731
    if kind == "Q8_0":
        return [half(0) * x for x in struct.unpack("<32b", raw[2:])]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        low = half(2) if kind[-1] == "1" else 0.0
        at = 4 if kind[-1] == "1" else 2
        high = 0
        if kind[1] == "5":
            high, at = int.from_bytes(raw[at : at + 4], "little"), at + 4
        q = [raw[at + j] & 15 for j in range(16)] + [raw[at + j] >> 4 for j in range(16)]
        q = [x | (high >> j & 1) << 4 for j, x in enumerate(q)]
        middle = {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
        return [half(0) * (x - middle) + low for x in q]
    if kind in ("Q4_K", "Q5_K"):
        s, bits = raw[4:16], raw[16:48]
        qs = raw[16:] if kind == "Q4_K" else raw[48:]
        out = []
        for j in range(8):  # sub-blocks of 32
            if j < 4:
                scale, low = s[j] & 63, s[j + 4] & 63
            else:
                scale, low = s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4
            for i in range(32):
                q = qs[j // 2 * 32 + i] >> j % 2 * 4 & 15
                if kind == "Q5_K":
                    q |= (bits[i] >> j & 1) << 4
                out.append(half(0) * scale * q - half(2) * low)
        return out
    ql, qh, scales = raw[:128], raw[128:192], struct.unpack("<16b", raw[192:208])
    out = [0.0] * 256
    for n in range(2):
        for i in range(32):
            for part in range(4):  # 32 numbers each
                q = ql[n * 64 + part % 2 * 32 + i] >> part // 2 * 4 & 15
                q |= (qh[n * 32 + i] >> part * 2 & 3) << 4
                out[n * 128 + part * 32 + i] = half(208) * scales[n * 8 + part * 2 + i // 16] * (q - 32)
    return out
