"""StableLM 1 (3B) and 2: Llama with LayerNorm, a quarter of a head rotated, a norm for each head if at all.
Source: transformers ``models/stablelm/modeling_stablelm.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {ours: entry for ours, entry in llama.FIELDS.items() if ours != "head_dim"} | {
    "vocab_size": ("vocab_size", 50304),
    "embed": ("hidden_size", 2560),
    "kv_heads": ("num_key_value_heads", 32),
    "mlp": ("intermediate_size", 6912),
    "max_positions": ("max_position_embeddings", 4096),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "qkv_bias": ("use_qkv_bias", False),
    "parallel": ("use_parallel_residual", False),
    "shared_norm": ("use_parallel_residual", False),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_ids": ("eos_token_id", 0),
}
MODULES = llama.MODULES | {
    "layers.q_norm": "layers.{layer}.self_attn.q_layernorm.norms.{head}",
    "layers.k_norm": "layers.{layer}.self_attn.k_layernorm.norms.{head}",
}


def from_hf(hf):
    values = read(hf, FIELDS)
    return DecoderConfig(
        family="stablelm",
        **values,
        rope=read_rope(hf, values, partial=0.25),
        norm="layer",
        norm_bias=True,
        qk_norm="per-head" if hf.get("qk_layernorm") else "none",
    )


def to_hf(config):
    rope = write_rope(config.rope, head_dim=config.head_dim)
    return write(config, FIELDS) | {"qk_layernorm": config.qk_norm == "per-head", "rope_parameters": rope}


FAMILY = DecoderFamily(
    name="stablelm",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "StableLmForCausalLM", "none": "StableLmModel"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
)
