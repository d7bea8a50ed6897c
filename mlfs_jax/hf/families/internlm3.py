"""InternLM 3: Llama's network (and transformers' Llama classes) under its own config.
Source: transformers ``models/internlm3/configuration_internlm3.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.entries import read, read_rope, renamed, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | llama.BIASES | {
    "vocab_size": ("vocab_size", 128512),
    "layers": ("num_hidden_layers", 48),
    "kv_heads": ("num_key_value_heads", 2),
    "head_dim": ("head_dim", 128),
    "mlp": ("intermediate_size", 10240),
    "max_positions": ("max_position_embeddings", 32768),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "pad_token_id": ("pad_token_id", 2),
}  # fmt: skip


def from_hf(hf):
    hf = renamed(hf, qkv_bias="attention_bias", bias="mlp_bias")
    values = read(hf, FIELDS)
    if values["qkv_bias"] != values["mlp_bias"]:
        raise ConfigError("qkv_bias differs from bias in config.json: transformers' InternLM 3 has both or neither.")
    return DecoderConfig(family="internlm3", **values, rope=read_rope(hf, values))


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="internlm3",
    prefix="model.",
    modules=llama.MODULES,
    architectures={"lm": "InternLM3ForCausalLM", "none": "InternLM3Model"},
    reads_as={"LlamaForCausalLM": "lm", "LlamaModel": "none"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="divides",
)
