"""OLMo 1: LayerNorm without parameters; queries, keys and values clipped.
Source: transformers ``models/olmo/modeling_olmo.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {ours: entry for ours, entry in llama.FIELDS.items() if ours != "norm_eps"} | {
    "vocab_size": ("vocab_size", 50304),
    "qkv_bias": ("attention_bias", False),
    "o_bias": ("attention_bias", False),
    "clip_qkv": ("clip_qkv", None),
    "pad_token_id": ("pad_token_id", 1),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_ids": ("eos_token_id", 50279),
}


def from_hf(hf):
    values = read(hf, FIELDS)
    return DecoderConfig(family="olmo", **values, rope=read_rope(hf, values), norm="none", norm_eps=1e-5)


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="olmo",
    prefix="model.",
    modules=llama.MODULES,
    architectures={"lm": "OlmoForCausalLM", "none": "OlmoModel"},
    from_hf=from_hf,
    to_hf=to_hf,
)
