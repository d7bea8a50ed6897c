"""GPT-2: learned positions; joined projections, stored [in, out].
Source: transformers ``models/gpt2/modeling_gpt2.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, renamed, write
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 50257),
    "embed": ("n_embd", 768),
    "layers": ("n_layer", 12),
    "heads": ("n_head", 12),
    "mlp": ("n_inner", None),
    "max_positions": ("n_positions", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "activation": ("activation_function", "gelu_new"),
    "tied": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", 50256),
    "eos_token_ids": ("eos_token_id", 50256),
}
QKV = "h.{layer}.attn.c_attn"
MODULES = {
    "embed.tokens": "wte",
    "embed.positions": "wpe",
    "layers.attn_norm": "h.{layer}.ln_1",
    **dict.fromkeys(("layers.q", "layers.k", "layers.v"), QKV),
    "layers.o": "h.{layer}.attn.c_proj",
    "layers.mlp_norm": "h.{layer}.ln_2",
    "layers.up": "h.{layer}.mlp.c_fc",
    "layers.down": "h.{layer}.mlp.c_proj",
    "norm": "ln_f",
}


def read_gpt2(hf, fields):
    """Our config values of a config.json of GPT-2's kind, in either spelling."""
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    values = read(renamed(hf, max_position_embeddings="n_positions", **names), fields)
    values["mlp"] = values["mlp"] or 4 * values["embed"]
    values["attn_scale"] = None if hf.get("scale_attn_weights", True) else 1.0
    biases = dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias"), True)
    return values | biases | {"positions": "learned", "norm": "layer", "gated": False}


def from_hf(hf):
    return DecoderConfig(family="gpt2", **read_gpt2(hf, FIELDS))


def to_hf(config):
    return write(config, FIELDS) | {"scale_attn_weights": config.attn_scale is None}


FAMILY = DecoderFamily(
    name="gpt2",
    prefix="transformer.",
    modules=MODULES,
    architectures={"lm": "GPT2LMHeadModel", "none": "GPT2Model"},
    in_out=True,
    foreign=("score", "classifier", "qa_outputs", "multiple_choice_head"),
    buffers=("h.*.attn.bias", "h.*.attn.masked_bias"),
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
    only={"scale_attn_by_inverse_layer_idx": False},
)
