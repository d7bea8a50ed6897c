"""GPT-NeoX (Pythia): attention and mlp read the same x, each through its norm; joined projections, head by head.
Source: transformers ``models/gpt_neox/modeling_gpt_neox.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, renamed, write, write_rope
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 50432),
    "embed": ("hidden_size", 6144),
    "layers": ("num_hidden_layers", 44),
    "heads": ("num_attention_heads", 64),
    "mlp": ("intermediate_size", 24576),
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "gelu"),
    "parallel": ("use_parallel_residual", True),
    "qkv_bias": ("attention_bias", True),
    "o_bias": ("attention_bias", True),
    "tied": ("tie_word_embeddings", False),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_ids": ("eos_token_id", 2),
}
QKV = "layers.{layer}.attention.query_key_value"
MODULES = {
    "embed.tokens": "embed_in",
    "layers.attn_norm": "layers.{layer}.input_layernorm",
    **dict.fromkeys(("layers.q", "layers.k", "layers.v"), QKV),
    "layers.o": "layers.{layer}.attention.dense",
    "layers.mlp_norm": "layers.{layer}.post_attention_layernorm",
    "layers.up": "layers.{layer}.mlp.dense_h_to_4h",
    "layers.down": "layers.{layer}.mlp.dense_4h_to_h",
    "norm": "final_layer_norm",
}


def from_hf(hf):
    hf = renamed(hf, rotary_pct="partial_rotary_factor", rotary_emb_base="rope_theta")
    values = read(hf, FIELDS)
    rope = read_rope(hf, values, partial=0.25)
    return DecoderConfig(
        family="gpt_neox", **values, rope=rope, norm="layer", norm_bias=True, mlp_bias=True, gated=False
    )


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope, head_dim=config.head_dim)}


FAMILY = DecoderFamily(
    name="gpt_neox",
    prefix="gpt_neox.",
    modules=MODULES,
    heads={"none": {}, "lm": {"head": "embed_out"}},
    architectures={"lm": "GPTNeoXForCausalLM", "none": "GPTNeoXModel"},
    by_head=(QKV,),
    tied={"embed_out.weight": "embed.tokens.table"},
    renamed={"lm_head.": "embed_out."},
    buffers=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
)
