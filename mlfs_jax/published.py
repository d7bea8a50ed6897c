"""Shapes of well-known published models, as their config.json has them, so that they can be planned without a hub.

Sizes are those of the model cards; ``tests/mlfs/test_plan.py`` holds the number of parameters against the published.
"""

from __future__ import annotations

from pathlib import Path

from mlfs_jax.config import Config
from mlfs_jax.errors import unknown
from mlfs_jax.hf import gguf
from mlfs_jax.hf.configs import family_of, from_hf
from mlfs_jax.hf.gguf_file import open_gguf
from mlfs_jax.hf.load import read_config
from mlfs_jax.hf.table import DecoderFamily
from mlfs_jax.registry import ENTRIES, resolve_model


def _llama(vocab: int, embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    } | more


def _llama_3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, factor: float, **more) -> dict:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    long = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": scaling}
    return _llama(128256, embed, layers, heads, kv_heads, mlp, **long, **more)


def _bert(embed: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": 30522,
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * embed,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    }


SHAPES: dict[str, dict] = {
    "llama-2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama-3.1-8b": _llama_3(4096, 32, 32, 8, 14336, 8.0),
    "llama-3.1-70b": _llama_3(8192, 80, 64, 8, 28672, 8.0),
    "llama-3.1-405b": _llama_3(16384, 126, 128, 8, 53248, 8.0),
    "llama-3.2-1b": _llama_3(2048, 16, 32, 8, 8192, 32.0, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama_3(3072, 28, 24, 8, 8192, 32.0, head_dim=128, tie_word_embeddings=True),
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
}
"""Name -> config.json."""


def config_of(name: str, *, labels: int = 2) -> Config:
    """The config of a model as it would be trained here: a decoder with its own head, an encoder with a classifier.

    Args:
        name: a published model of :data:`SHAPES`, a config.json (of any name), a GGUF file, a folder with one of the
            two, a hub id org/name (whose config.json alone is downloaded), a name of the catalogue (fetched).
        labels: outputs of the classifier.

    Raises:
        UnknownNameError: there is no such model, or its architecture is not built here.
        ConfigError, CheckpointError: its config.json cannot be used.
    """
    path = Path(name).expanduser()
    if name not in SHAPES and not path.exists():
        if "/" not in name and name not in {entry.name for entry in ENTRIES}:
            known = [*SHAPES, *(entry.name for entry in ENTRIES if entry.kind == "model")]
            raise unknown("model (nor is it a config.json, a GGUF file, nor a folder with one)", name, known)
        path = resolve_model(name, files=("config.json",))
    if name not in SHAPES and (file := gguf.gguf_in(path)) is not None:
        return gguf.config_of(open_gguf(file))
    hf = SHAPES[name] if name in SHAPES else read_config(path)
    if isinstance(family_of(hf), DecoderFamily):
        return from_hf(hf, head="lm")
    return from_hf(hf, head="sequence", labels=labels, problem="classification")
