"""Mistral, and Danube 1 and 2: Llama with a sliding window in all layers.
Source: transformers ``models/mistral/modeling_mistral.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_one_window, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "kv_heads": ("num_key_value_heads", 8),
    "mlp": ("intermediate_size", 14336),
    "max_positions": ("max_position_embeddings", 4096 * 32),
}


def from_hf(hf):
    values = read(hf, FIELDS)
    window = hf.get("sliding_window", 4096)
    return DecoderConfig(
        family="mistral",
        **values,
        rope=read_rope(hf, values),
        windows=(window,) * values["layers"] if window else (),
    )


def to_hf(config):
    entries = {"sliding_window": write_one_window(config), "rope_parameters": write_rope(config.rope)}
    return write(config, FIELDS) | entries


FAMILY = DecoderFamily(
    name="mistral",
    prefix="model.",
    modules=llama.MODULES,
    architectures={"lm": "MistralForCausalLM", "none": "MistralModel"},
    from_hf=from_hf,
    to_hf=to_hf,
    only={"layer_types": None},
)
