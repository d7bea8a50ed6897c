"""Phi 1, 1.5 and 2: attention and mlp behind one norm, added together; biases everywhere; part of a head is rotated.
Source: transformers ``models/phi/modeling_phi.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "vocab_size": ("vocab_size", 51200),
    "embed": ("hidden_size", 2048),
    "layers": ("num_hidden_layers", 24),
    "mlp": ("intermediate_size", 8192),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "gelu_new"),
}
MODULES = {
    "embed.tokens": "embed_tokens",
    "layers.attn_norm": "layers.{layer}.input_layernorm",
    "layers.q": "layers.{layer}.self_attn.q_proj",
    "layers.k": "layers.{layer}.self_attn.k_proj",
    "layers.v": "layers.{layer}.self_attn.v_proj",
    "layers.o": "layers.{layer}.self_attn.dense",
    "layers.q_norm": "layers.{layer}.self_attn.q_layernorm",
    "layers.k_norm": "layers.{layer}.self_attn.k_layernorm",
    "layers.up": "layers.{layer}.mlp.fc1",
    "layers.down": "layers.{layer}.mlp.fc2",
    "norm": "final_layernorm",
}
BIASES = dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias", "head_bias"), True)


def from_hf(hf):
    values = read(hf, FIELDS)
    normed = bool(hf.get("qk_layernorm"))
    return DecoderConfig(
        family="phi",
        **values,
        **BIASES,
        rope=read_rope(hf, values, partial=0.5),
        norm="layer",
        parallel=True,
        shared_norm=True,
        gated=False,
        qk_norm="head" if normed else "none",
        qk_norm_bias=normed,
    )


def to_hf(config):
    if config.qk_norm != "none" and config.embed // config.heads != config.head_dim:
        raise ConfigError("qk_norm = 'head': then Phi at Hugging Face needs head_dim = embed // heads.")
    rope = write_rope(config.rope, head_dim=config.head_dim)
    return write(config, FIELDS) | {"qk_layernorm": config.qk_norm == "head", "rope_parameters": rope}


FAMILY = DecoderFamily(
    name="phi",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "PhiForCausalLM", "none": "PhiModel"},
    from_hf=from_hf,
    to_hf=to_hf,
)
