"""Qwen 3: one norm for the queries and one for the keys of all heads.
Source: transformers ``models/qwen3/modeling_qwen3.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write
from mlfs_jax.hf.families import llama, qwen2
from mlfs_jax.hf.table import DecoderFamily

FIELDS = qwen2.FIELDS | {
    "head_dim": ("head_dim", 128),
    "qkv_bias": ("attention_bias", False),
    "o_bias": ("attention_bias", False),
}
MODULES = llama.MODULES | {
    "layers.q_norm": "layers.{layer}.self_attn.q_norm",
    "layers.k_norm": "layers.{layer}.self_attn.k_norm",
}


def from_hf(hf):
    values = read(hf, FIELDS)
    windows = qwen2.qwen_windows(hf, values["layers"])
    return DecoderConfig(family="qwen3", **values, rope=read_rope(hf, values), windows=windows, qk_norm="head")


def to_hf(config):
    return write(config, FIELDS) | qwen2.qwen_entries(config)


FAMILY = DecoderFamily(
    name="qwen3",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "Qwen3ForCausalLM", "none": "Qwen3Model"},
    from_hf=from_hf,
    to_hf=to_hf,
)
