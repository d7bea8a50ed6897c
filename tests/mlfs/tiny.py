"""Small random models and batches that the tests share: odd sizes, no weight left at zero."""

import jax
import jax.numpy as jnp
import numpy as np

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import DecoderConfig, EncoderConfig, Latent, Rope
from mlfs_jax.lora import init_lora
from mlfs_jax.model import Model, abstract, build

FAMILIES = {
    "bert": {"type_vocab": 2},
    "roberta": {"type_vocab": 1, "pad_token_id": 1, "position_offset": 2, "norm_eps": 1e-5},
    "distilbert": {"head_activation": "relu"},
    "electra": {"type_vocab": 2, "embedding_size": 10, "head_activation": "gelu"},
}

ROPE = Rope(theta=10000.0, dim=6)
DECODERS = {  # one of each kind of block, attention and position
    "llama": {"rope": ROPE, "tied": False},
    "mqa-learned": {"positions": "learned", "kv_heads": 1, "norm": "layer", "norm_bias": True, "gated": False}
    | {"activation": "gelu_new", "qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_bias": True},
    "gemma2": {"rope": ROPE, "norm_at": "sandwich", "norm_offset": 1.0, "windows": (4, 0, 4), "attn_softcap": 5.0}
    | {"logit_softcap": 3.0, "embed_scale": 4.9, "activation": "gelu_pytorch_tanh", "attn_scale": 0.5},
    "gemma3": {"rope": ROPE, "local_rope": Rope(100.0, 6), "windows": (4, 0, 4), "qk_norm": "head", "norm_offset": 1.0},
    "olmo2": {"rope": ROPE, "norm_at": "output", "qk_norm": "full"},
    "neox": {"rope": Rope(10000.0, 4), "kv_heads": 4, "parallel": True, "norm": "layer", "norm_bias": True}
    | {"gated": False, "activation": "gelu"},
    "phi": {"rope": Rope(10000.0, 4), "parallel": True, "shared_norm": True, "norm": "layer", "norm_bias": True}
    | {"qk_norm": "per-head", "qk_norm_bias": True, "head_bias": True, "tied": False},
    "bloom": {"positions": "alibi", "alibi_heads": 4, "kv_heads": 4, "norm": "layer", "norm_bias": True}
    | {"embed_norm": True, "gated": False, "activation": "gelu_new"},
    "opt-350m": {"positions": "learned", "position_offset": 2, "norm": "layer", "norm_bias": True, "norm_at": "post"}
    | {"final_norm": False, "embedding_size": 10, "gated": False, "activation": "relu", "kv_heads": 4},
    "glm": {"rope": Rope(10000.0, 4, interleaved=True), "norm": "none", "clip_qkv": 0.5},
    "mla": {"rope": Rope(10000.0, 2), "kv_heads": 4, "latent": Latent(8, 10, nope=4, rope=2, value=5)}
    | {"residual_scale": 0.7, "logit_scale": 0.5},
}


def tiny_decoder(kind: str = "llama", seed: int = 0, **changes) -> Model:
    sizes = {"vocab_size": 53, "embed": 24, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 20}
    config = DecoderConfig(**{"family": kind, "max_positions": 24, **sizes, **DECODERS[kind], **changes})
    return random_model(config, seed)


def tiny_config(family: str = "bert", **changes) -> EncoderConfig:
    sizes = {"vocab_size": 53, "embed": 24, "layers": 3, "heads": 4, "head_dim": 6, "mlp": 20, "max_positions": 24}
    return EncoderConfig(**{"family": family, **sizes, "head": "sequence", "labels": 3, **FAMILIES[family], **changes})


def tiny_model(family: str = "bert", seed: int = 0, **changes) -> Model:
    return random_model(tiny_config(family, **changes), seed)


def random_model(config, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract(config)[1]).items()}
    weights = {name: rng.normal(name.endswith("scale"), 0.2, shape) for name, shape in shapes.items()}
    return build(config, {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()})


def tiny_lora(model: Model, seed: int = 2, rank: int = 3, sites=None, full=("head",)):
    """An adapter that does something: no B matrix, no delta is left at zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), model, rank=rank, sites=sites, full=full))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)


def random_lora(model: Model):
    """The same for a model without a head to train."""
    return tiny_lora(model, full=())


def tiny_tokens(config: DecoderConfig, seed: int = 0, batch: int = 3, length: int = 8) -> dict:
    """Random texts with padding at the end of all rows but the first; every real token but the first counts."""
    rng = np.random.default_rng(seed)
    real = np.arange(length) < np.r_[length, rng.integers(2, length, batch - 1)][:, None]
    counts = real & (np.arange(length) > 0)
    tokens = rng.integers(3, config.vocab_size, (batch, length))
    filled = {"input_ids": np.where(real, tokens, config.pad_token_id), "attention_mask": real, "loss_mask": counts}
    return {name: jnp.asarray(x, jnp.int32) for name, x in filled.items()}


def tiny_batch(config: EncoderConfig, seed: int = 0, batch: int = 3, length: int = 8) -> dict:
    """Random tokens with padding at the end of all rows but the first; integer labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, config.vocab_size, (batch, length))
    mask = np.arange(length) < np.r_[length, rng.integers(2, length, batch - 1)][:, None]
    filled = {
        "input_ids": np.where(mask, tokens, config.pad_token_id),
        "attention_mask": mask,
        "labels": rng.integers(0, max(config.labels, 1), batch),
    }
    if config.type_vocab > 1:
        filled["token_type_ids"] = rng.integers(0, config.type_vocab, (batch, length))
    return {name: jnp.asarray(x, jnp.int32) for name, x in filled.items()}
