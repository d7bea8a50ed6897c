"""Llama 1 to 3.x, and what is shaped like it: TinyLlama, SmolLM 1 and 2, Sheared-LLaMA, CodeLlama, Danube 3, MobileLLM.
Source: transformers ``models/llama/modeling_llama.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 32000),
    "embed": ("hidden_size", 4096),
    "layers": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32),
    "kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "mlp": ("intermediate_size", 11008),
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
    "tied": ("tie_word_embeddings", False),
    "pad_token_id": ("pad_token_id", None),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_ids": ("eos_token_id", 2),
}
BIASES = {
    "qkv_bias": ("attention_bias", False),
    "o_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
MODULES = {
    "embed.tokens": "embed_tokens",
    "layers.attn_norm": "layers.{layer}.input_layernorm",
    "layers.q": "layers.{layer}.self_attn.q_proj",
    "layers.k": "layers.{layer}.self_attn.k_proj",
    "layers.v": "layers.{layer}.self_attn.v_proj",
    "layers.o": "layers.{layer}.self_attn.o_proj",
    "layers.mlp_norm": "layers.{layer}.post_attention_layernorm",
    "layers.gate": "layers.{layer}.mlp.gate_proj",
    "layers.up": "layers.{layer}.mlp.up_proj",
    "layers.down": "layers.{layer}.mlp.down_proj",
    "norm": "norm",
}


def from_hf(hf):
    values = read(hf, FIELDS | BIASES)
    return DecoderConfig(family="llama", **values, rope=read_rope(hf, values))


def to_hf(config):
    return write(config, FIELDS | BIASES) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="llama",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "LlamaForCausalLM", "none": "LlamaModel"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="divides",
)
