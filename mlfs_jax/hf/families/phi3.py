"""Phi-3 (short context): Llama with joined projections and a window in all layers or none.
Source: transformers ``models/phi3/modeling_phi3.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_one_window, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = llama.FIELDS | {
    "vocab_size": ("vocab_size", 32064),
    "embed": ("hidden_size", 3072),
    "mlp": ("intermediate_size", 8192),
    "max_positions": ("max_position_embeddings", 4096),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "pad_token_id": ("pad_token_id", 32000),
    "eos_token_ids": ("eos_token_id", 32000),
}
MODULES = (
    llama.MODULES
    | dict.fromkeys(("layers.q", "layers.k", "layers.v"), "layers.{layer}.self_attn.qkv_proj")
    | dict.fromkeys(("layers.gate", "layers.up"), "layers.{layer}.mlp.gate_up_proj")
)


def from_hf(hf):
    values = read(hf, FIELDS)
    return DecoderConfig(
        family="phi3",
        **values,
        rope=read_rope(hf, values, partial=1.0, kinds=("default",)),
        windows=(hf["sliding_window"],) * values["layers"] if hf.get("sliding_window") else (),
    )


def to_hf(config):
    rope = write_rope(config.rope, head_dim=config.head_dim)
    return write(config, FIELDS) | {"sliding_window": write_one_window(config), "rope_parameters": rope}


FAMILY = DecoderFamily(
    name="phi3",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "Phi3ForCausalLM", "none": "Phi3Model"},
    from_hf=from_hf,
    to_hf=to_hf,
)
