"""MiniCPM 3: latent attention; embeddings, branches and hidden states scaled.
Source: transformers ``models/minicpm3/modeling_minicpm3.py``."""

from mlfs_jax.config import DecoderConfig, Latent
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.entries import read, read_rope, write, write_rope
from mlfs_jax.hf.families import llama
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {ours: entry for ours, entry in (llama.FIELDS | llama.BIASES).items() if ours != "head_dim"} | {
    "vocab_size": ("vocab_size", 73448),
    "embed": ("hidden_size", 2560),
    "layers": ("num_hidden_layers", 62),
    "heads": ("num_attention_heads", 40),
    "kv_heads": ("num_key_value_heads", 40),
    "mlp": ("intermediate_size", 6400),
    "max_positions": ("max_position_embeddings", 32768),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "tied": ("tie_word_embeddings", True),
    "embed_scale": ("scale_emb", 12),
}
ATTENTION = "layers.{layer}.self_attn."
MODULES = {site: module for site, module in llama.MODULES.items() if site not in ("layers.k", "layers.v")} | {
    "layers.q_down": ATTENTION + "q_a_proj",
    "layers.q_latent_norm": ATTENTION + "q_a_layernorm",
    "layers.q": ATTENTION + "q_b_proj",
    "layers.kv_down": ATTENTION + "kv_a_proj_with_mqa",
    "layers.k_rope": ATTENTION + "kv_a_proj_with_mqa",
    "layers.kv_latent_norm": ATTENTION + "kv_a_layernorm",
    "layers.kv_up": ATTENTION + "kv_b_proj",
}
SIZES = {"q_rank": ("q_lora_rank", 768), "kv_rank": ("kv_lora_rank", 256), "nope": ("qk_nope_head_dim", 64),
         "rope": ("qk_rope_head_dim", 32), "value": ("v_head_dim", None)}  # fmt: skip


def from_hf(hf):
    values = read(hf, FIELDS)
    sizes = {ours: hf.get(theirs, default) for ours, (theirs, default) in SIZES.items()}
    if sizes["q_rank"] is None or values["kv_heads"] != values["heads"]:
        raise ConfigError("q_lora_rank = null, or fewer num_key_value_heads than heads: MiniCPM 3 has neither.")
    if (hf.get("rope_parameters") or hf.get("rope_scaling") or {}).get("mscale_all_dim"):
        raise ConfigError("mscale_all_dim in rope_parameters scales attention, which MiniCPM 3's own weights do not.")
    sizes["value"] = sizes["value"] or values["head_dim"]
    values["head_dim"] = sizes["nope"] + sizes["rope"]
    depth, base = hf.get("scale_depth", 1.4), hf.get("dim_model_base", 256)
    return DecoderConfig(
        family="minicpm3",
        **values,
        rope=read_rope(hf, values, head_dim=sizes["rope"]),
        latent=Latent(**sizes),
        residual_scale=1.0 if depth is None else depth / values["layers"] ** 0.5,
        logit_scale=1.0 if base is None else base / values["embed"],
    )


def to_hf(config):
    return write(config, FIELDS) | {
        **{theirs: getattr(config.latent, ours) for ours, (theirs, _) in SIZES.items()},
        "scale_depth": config.residual_scale * config.layers**0.5,
        "dim_model_base": max(1, round(config.logit_scale * config.embed)),
        "rope_parameters": write_rope(config.rope),
    }


FAMILY = DecoderFamily(
    name="minicpm3",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "MiniCPM3ForCausalLM", "none": "MiniCPM3Model"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="divides",
)
