"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows in the upper layers if at all.
Source: transformers ``models/qwen2/modeling_qwen2.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, read_windows, write, write_rope, write_windows
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "vocab_size": ("vocab_size", 151936),
    "kv_heads": ("num_key_value_heads", 32),
    "mlp": ("intermediate_size", 22016),
    "max_positions": ("max_position_embeddings", 32768),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_ids": ("eos_token_id", None),
}


def qwen_windows(hf, layers):
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28) if window else layers
    types = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return read_windows(types, window, layers)


def qwen_entries(config):
    types, window = write_windows(config)
    windows = {"layer_types": types, "sliding_window": window, "use_sliding_window": window is not None}
    return windows | {"rope_parameters": write_rope(config.rope)}


def from_hf(hf):
    values = read(hf, FIELDS)
    windows = qwen_windows(hf, values["layers"])
    return DecoderConfig(family="qwen2", **values, rope=read_rope(hf, values), windows=windows, qkv_bias=True)


def to_hf(config):
    return write(config, FIELDS) | qwen_entries(config)


FAMILY = DecoderFamily(
    name="qwen2",
    prefix="model.",
    modules=llama.MODULES,
    architectures={"lm": "Qwen2ForCausalLM", "none": "Qwen2Model"},
    from_hf=from_hf,
    to_hf=to_hf,
)
