"""GLM-4 and GLM-Edge in transformers' own class: pairs of neighbouring channels are rotated, in half of each head.
Source: transformers ``models/glm/modeling_glm.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "vocab_size": ("vocab_size", 151552),
    "layers": ("num_hidden_layers", 40),
    "kv_heads": ("num_key_value_heads", 2),
    "head_dim": ("head_dim", 128),
    "mlp": ("intermediate_size", 13696),
    "max_positions": ("max_position_embeddings", 131072),
    "norm_eps": ("rms_norm_eps", 1.5625e-07),
    "qkv_bias": ("attention_bias", True),
    "pad_token_id": ("pad_token_id", 151329),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_ids": ("eos_token_id", None),
}
MODULES = llama.MODULES | dict.fromkeys(("layers.gate", "layers.up"), "layers.{layer}.mlp.gate_up_proj")


def from_hf(hf):
    if hf.get("eos_token_id") is None:
        hf = {**hf, "eos_token_id": [151329, 151336, 151338]}
    values = read(hf, FIELDS)
    return DecoderConfig(family="glm", **values, rope=read_rope(hf, values, partial=0.5, interleaved=True))


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope, head_dim=config.head_dim)}


FAMILY = DecoderFamily(
    name="glm",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "GlmForCausalLM", "none": "GlmModel"},
    from_hf=from_hf,
    to_hf=to_hf,
)
