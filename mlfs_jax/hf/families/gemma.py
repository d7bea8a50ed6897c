"""Gemma 1: GeGLU, norms around 1, embeddings scaled by sqrt(D).
Source: transformers ``models/gemma/modeling_gemma.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "vocab_size": ("vocab_size", 256000),
    "embed": ("hidden_size", 3072),
    "layers": ("num_hidden_layers", 28),
    "heads": ("num_attention_heads", 16),
    "kv_heads": ("num_key_value_heads", 16),
    "head_dim": ("head_dim", 256),
    "mlp": ("intermediate_size", 24576),
    "max_positions": ("max_position_embeddings", 8192),
    "activation": ("hidden_act", "gelu_pytorch_tanh"),
    "tied": ("tie_word_embeddings", True),
    "qkv_bias": ("attention_bias", False),
    "o_bias": ("attention_bias", False),
    "pad_token_id": ("pad_token_id", 0),
    "bos_token_id": ("bos_token_id", 2),
    "eos_token_ids": ("eos_token_id", 1),
}


def from_hf(hf):
    values = read(hf, FIELDS)
    if values["activation"] == "gelu":  # transformers: a legacy value of the releases, which mean the approximation
        values["activation"] = "gelu_pytorch_tanh"
    return DecoderConfig(
        family="gemma",
        **values,
        rope=read_rope(hf, values),
        norm_offset=1.0,
        embed_scale=values["embed"] ** 0.5,
    )


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="gemma",
    prefix="model.",
    modules=llama.MODULES,
    architectures={"lm": "GemmaForCausalLM", "none": "GemmaModel"},
    from_hf=from_hf,
    to_hf=to_hf,
)
