"""OLMo 2: norms behind the branches instead of before; queries and keys normed over all heads together.
Source: transformers ``models/olmo2/modeling_olmo2.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import olmo, qwen3
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {ours: entry for ours, entry in olmo.FIELDS.items() if ours != "clip_qkv"} | {
    "norm_eps": ("rms_norm_eps", 1e-5)
}
MODULES = {site: module for site, module in qwen3.MODULES.items() if not site.endswith(("attn_norm", "mlp_norm"))} | {
    "layers.attn_out_norm": "layers.{layer}.post_attention_layernorm",
    "layers.mlp_out_norm": "layers.{layer}.post_feedforward_layernorm",
}


def from_hf(hf):
    values = read(hf, FIELDS)
    return DecoderConfig(family="olmo2", **values, rope=read_rope(hf, values), norm_at="output", qk_norm="full")


def to_hf(config):
    return write(config, FIELDS) | {"rope_parameters": write_rope(config.rope)}


FAMILY = DecoderFamily(
    name="olmo2",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "Olmo2ForCausalLM", "none": "Olmo2Model"},
    from_hf=from_hf,
    to_hf=to_hf,
)
