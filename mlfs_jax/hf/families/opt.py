"""OPT: learned positions from row 2 on; the 350m has its norms behind the residual and a narrower token table.
Source: transformers ``models/opt/modeling_opt.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.entries import read, write
from mlfs_jax.hf.table import DecoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 50272),
    "embed": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp": ("ffn_dim", 3072),
    "max_positions": ("max_position_embeddings", 2048),
    "activation": ("activation_function", "relu"),
    **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("enable_bias", True)),
    "tied": ("tie_word_embeddings", True),
    "pad_token_id": ("pad_token_id", 1),
    "bos_token_id": ("bos_token_id", 2),
    "eos_token_ids": ("eos_token_id", 2),
}
LAYER = "decoder.layers.{layer}."
MODULES = {
    "embed.tokens": "decoder.embed_tokens",
    "embed.positions": "decoder.embed_positions",
    "embed.proj": "decoder.project_in",
    "layers.attn_norm": LAYER + "self_attn_layer_norm",
    "layers.q": LAYER + "self_attn.q_proj",
    "layers.k": LAYER + "self_attn.k_proj",
    "layers.v": LAYER + "self_attn.v_proj",
    "layers.o": LAYER + "self_attn.out_proj",
    "layers.mlp_norm": LAYER + "final_layer_norm",
    "layers.up": LAYER + "fc1",
    "layers.down": LAYER + "fc2",
    "norm": "decoder.final_layer_norm",
}


def from_hf(hf):
    values = read(hf, FIELDS)
    narrow, before = hf.get("word_embed_proj_dim"), hf.get("do_layer_norm_before", True)
    affine = hf.get("layer_norm_elementwise_affine", True)
    return DecoderConfig(
        family="opt",
        **values,
        positions="learned",
        position_offset=2,
        embedding_size=None if narrow == values["embed"] else narrow,
        norm="layer" if affine else "none",
        norm_bias=affine,
        norm_at="pre" if before else "post",
        final_norm=before and not hf.get("_remove_final_layer_norm", False),
        gated=False,
    )


def to_hf(config):
    if config.head == "none" and config.embedding_size:
        raise ConfigError("head = 'none': an OPT with a narrower token table projects back to it; only its LM is OPT.")
    before = config.norm_at == "pre"
    return write(config, FIELDS) | {
        "word_embed_proj_dim": config.embedding_size or config.embed,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "layer_norm_elementwise_affine": config.norm == "layer",
    }


FAMILY = DecoderFamily(
    name="opt",
    prefix="model.",
    modules=MODULES,
    heads={"none": {}, "lm": {"head": "lm_head", "head.proj": "model.decoder.project_out"}},
    architectures={"lm": "OPTForCausalLM", "none": "OPTModel"},
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
)
