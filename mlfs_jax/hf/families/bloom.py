"""Bloom: ALiBi, a norm behind the token table, an mlp of four times the width; joined projections, head by head.
Source: transformers ``models/bloom/modeling_bloom.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, renamed, write
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 250880),
    "embed": ("hidden_size", 64),
    "layers": ("n_layer", 2),
    "heads": ("n_head", 8),
    "max_positions": ("seq_length", 2048),  # a habit: ALiBi has no end
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tied": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_ids": ("eos_token_id", 2),
}
QKV = "h.{layer}.self_attention.query_key_value"
MODULES = {
    "embed.tokens": "word_embeddings",
    "embed.norm": "word_embeddings_layernorm",
    "layers.attn_norm": "h.{layer}.input_layernorm",
    **dict.fromkeys(("layers.q", "layers.k", "layers.v"), QKV),
    "layers.o": "h.{layer}.self_attention.dense",
    "layers.mlp_norm": "h.{layer}.post_attention_layernorm",
    "layers.up": "h.{layer}.mlp.dense_h_to_4h",
    "layers.down": "h.{layer}.mlp.dense_4h_to_h",
    "norm": "ln_f",
}
BIASES = dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias"), True)


def from_hf(hf):
    hf = renamed(hf, num_hidden_layers="n_layer", num_attention_heads="n_head", n_embed="hidden_size")
    values = read(hf, FIELDS)
    return DecoderConfig(
        family="bloom",
        **values,
        **BIASES,
        mlp=4 * values["embed"],
        positions="alibi",
        alibi_heads=values["heads"],
        embed_norm=True,
        norm="layer",
        activation="gelu_pytorch_tanh",
        gated=False,
    )


def to_hf(config):
    return write(config, FIELDS)


FAMILY = DecoderFamily(
    name="bloom",
    prefix="transformer.",
    modules=MODULES,
    architectures={"lm": "BloomForCausalLM", "none": "BloomModel"},
    by_head=(QKV,),
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
    mlp_ratio=4,
    only={"apply_residual_connection_post_layernorm": False},
)
