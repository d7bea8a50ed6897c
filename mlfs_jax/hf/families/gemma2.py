"""Gemma 2: a norm before and behind each branch, soft-capped scores and logits, every second layer with a window.
Source: transformers ``models/gemma2/modeling_gemma2.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, read_windows, write, write_rope, write_windows
from mlfs_jax.hf.families import gemma
from mlfs_jax.hf.table import DecoderFamily

FIELDS = gemma.FIELDS | {
    "embed": ("hidden_size", 2304),
    "layers": ("num_hidden_layers", 26),
    "heads": ("num_attention_heads", 8),
    "kv_heads": ("num_key_value_heads", 4),
    "mlp": ("intermediate_size", 9216),
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "attn_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
}
MODULES = {**gemma.FAMILY.modules} | {
    "layers.attn_out_norm": "layers.{layer}.post_attention_layernorm",
    "layers.mlp_norm": "layers.{layer}.pre_feedforward_layernorm",
    "layers.mlp_out_norm": "layers.{layer}.post_feedforward_layernorm",
}


def attn_scale(hf, head_dim):
    scalar = hf.get("query_pre_attn_scalar", 256)
    return None if scalar == head_dim else scalar**-0.5


def entries(config):
    types, window = write_windows(config)
    scalar = config.head_dim if config.attn_scale is None else round(config.attn_scale**-2)
    return {"layer_types": types, "sliding_window": window or 4096, "query_pre_attn_scalar": scalar}


def from_hf(hf):
    values = read(hf, FIELDS)
    layers = values["layers"]
    types = hf.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return DecoderConfig(
        family="gemma2",
        **values,
        rope=read_rope(hf, values),
        windows=read_windows(types, hf.get("sliding_window", 4096), layers),
        norm_at="sandwich",
        norm_offset=1.0,
        embed_scale=values["embed"] ** 0.5,
        attn_scale=attn_scale(hf, values["head_dim"]),
    )


def to_hf(config):
    return write(config, FIELDS) | entries(config) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="gemma2",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "Gemma2ForCausalLM", "none": "Gemma2Model"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="divides",
)
