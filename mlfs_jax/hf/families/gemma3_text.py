"""Gemma 3, text only: norms of queries and keys; the layers with a window have a rope of their own.
Source: transformers ``models/gemma3/modeling_gemma3.py`` (which does not cap the attention scores)."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.entries import read, read_rope, read_windows, write, write_rope
from mlfs_jax.hf.families import gemma2, qwen3
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {ours: entry for ours, entry in gemma2.FIELDS.items() if ours != "attn_softcap"} | {
    "vocab_size": ("vocab_size", 262208),
    "max_positions": ("max_position_embeddings", 131072),
    "logit_softcap": ("final_logit_softcapping", None),
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def from_hf(hf):
    values = read(hf, FIELDS)
    layers, every = values["layers"], hf.get("sliding_window_pattern", 6)
    types = hf.get("layer_types") or [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]
    windows = read_windows(types, hf.get("sliding_window", 4096), layers)
    ropes = hf.get("rope_parameters") or {}
    if not ropes.keys() <= {LOCAL, GLOBAL}:
        raise ConfigError(f"rope_parameters = {ropes} in config.json: expected one dict for {LOCAL}, one for {GLOBAL}.")
    far, near = (ropes.get(GLOBAL) or {}) | (hf.get("rope_scaling") or {}), ropes.get(LOCAL) or {}
    near = read_rope(hf, values, parameters=near, theta=hf.get("rope_local_base_freq", 1e4))
    return DecoderConfig(
        family="gemma3_text",
        **values,
        rope=read_rope(hf, values, parameters=far, theta=hf.get("rope_theta", 1e6)),
        local_rope=near if windows else None,
        windows=windows,
        norm_at="sandwich",
        norm_offset=1.0,
        embed_scale=values["embed"] ** 0.5,
        attn_scale=gemma2.attn_scale(hf, values["head_dim"]),
        qk_norm="head",
    )


def to_hf(config):
    ropes = {GLOBAL: write_rope(config.rope), LOCAL: write_rope(config.local_rope or config.rope)}
    return write(config, FIELDS) | gemma2.entries(config) | {"rope_parameters": ropes}


FAMILY = DecoderFamily(
    name="gemma3_text",
    prefix="model.",
    modules=gemma2.MODULES | {site: qwen3.MODULES[site] for site in ("layers.q_norm", "layers.k_norm")},
    architectures={"lm": "Gemma3ForCausalLM", "none": "Gemma3TextModel"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="divides",
    only={"attn_logit_softcapping": None},
)
