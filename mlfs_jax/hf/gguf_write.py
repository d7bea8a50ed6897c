"""Model -> GGUF file that llama.cpp runs: weights, shape, tokenizer and chat template in one file."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import CheckpointError, ConfigError, RunError
from mlfs_jax.hf.gguf import SITES, permute, permuted, tensor_names
from mlfs_jax.hf.gguf_file import open_gguf
from mlfs_jax.hf.gguf_rope import ROPE_FREQS, llama3_factors, rope_metadata
from mlfs_jax.hf.gguf_tokenizer import tokenizer_metadata
from mlfs_jax.hf.table import hf_shape, to_theirs
from mlfs_jax.model import Model

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Our family -> general.architecture."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What can be asked for -> general.file_type."""

BLOCK = 32  # weights that share a scale in Q8_0

MARK = "mlfs_jax.export"
"""Metadata key of our exports: a new export may replace such a file, and no other."""

EXPRESSIBLE = (
    *("family", "vocab_size", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions", "rope"),
    *("norm_eps", "qkv_bias", "o_bias", "mlp_bias", "tied", "head", "pad_token_id", "bos_token_id", "eos_token_ids"),
)
"""Fields of a config that a GGUF of these architectures says; the others must be as in Llama."""


@dataclass(frozen=True)
class GGUFReport:
    """What an export wrote.

    Attributes:
        types: tensor type -> how many tensors have it.
        fallbacks: tensor -> the type it has instead of the one that was asked for.
        why: one sentence on each repair; empty when all is as asked.
    """

    path: Path
    architecture: str
    nbytes: int
    parameters: int
    types: dict[str, int]
    fallbacks: dict[str, str]
    why: tuple[str, ...]

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"path": self.path.name}


def export_gguf(
    model: Model,
    path: str | Path,
    dtype: str = "f16",
    *,
    tokenizer_from: str | Path | None = None,
    name: str | None = None,
    values_f16: bool = True,
) -> GGUFReport:
    """Write a model, sliced or whole, as a GGUF file. It appears in one rename.

    Vectors (norms, biases) are float32. In a Q8_0 file two kinds of matrices are F16, and the report says which: those
    whose rows are no multiple of 32, and the values of grouped-query attention, which are small and on which much
    depends (llama.cpp's mixed types spend more bits on them, too; experiments/check_gguf_llamacpp.py measures it).

    Args:
        dtype: "f16", "bf16", "q8_0" or "f32", of the matrices.
        tokenizer_from: folder with tokenizer.json and tokenizer_config.json; None: ``model.source``.
        name: general.name of the file; None: the model's.
        values_f16: False: grouped values are Q8_0 like the rest, as llama.cpp's own quantiser has it.

    Raises:
        ConfigError: llama.cpp's architectures written here cannot express the model, or ``dtype`` is unknown.
        CheckpointError: there is no tokenizer, or none that a GGUF can express; or a weight is too large for F16.
        RunError: there is a file of that name which is not an export.
    """
    path = Path(path).expanduser()
    if dtype not in FILE_TYPES:
        raise ConfigError(f"dtype = {dtype!r} of a GGUF: expected one of {', '.join(FILE_TYPES)}.")
    arch = check_expressible(model.config)
    _check_free(path)
    folder = Path(tokenizer_from).expanduser() if tokenizer_from is not None else model.source
    metadata = {
        "general.type": "model",
        "general.name": name or model.name,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
        MARK: 1,
        **shape_metadata(model.decoder, arch),
        **tokenizer_metadata(folder, model.decoder),
    }
    plan = _plan(model, dtype, values_f16)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        _write(fresh, arch, metadata, plan, _contents(model, arch))
        os.chmod(fresh, 0o644)  # mkstemp's own is for this user only
        os.replace(fresh, path)
    except OSError as e:
        raise RunError(f"{path} could not be written: {e}; is the disk full?") from e
    finally:
        if os.path.exists(fresh):
            os.unlink(fresh)
    fallbacks = {key: kind for key, (shape, kind) in plan.items() if len(shape) > 1 and kind != dtype.upper()}
    odd = {key for key in fallbacks if plan[key][0][-1] % BLOCK}
    why = []
    if odd:
        rows = ", ".join(map(str, sorted({plan[key][0][-1] for key in odd})))
        why.append(f"{len(odd)} matrices are F16, not Q8_0: their rows of {rows} are no multiple of {BLOCK}.")
    if len(odd) < len(fallbacks):
        why.append("attn_v is F16, not Q8_0: several heads share it.")
    return GGUFReport(
        path=path,
        architecture=arch,
        nbytes=path.stat().st_size,
        parameters=model.num_params,
        types=dict(Counter(kind for _, kind in plan.values())),
        fallbacks=fallbacks,
        why=tuple(why),
    )


def check_expressible(config) -> str:
    """The architecture that says this config.

    Raises:
        ConfigError: none of those written here does; the message names the field.
    """
    if config.family not in FAMILIES:
        raise ConfigError(
            f"a GGUF of the family {config.family!r} is not written here; {', '.join(FAMILIES)} are. "
            "Export it as a Hugging Face checkpoint, which llama.cpp's converter may take."
        )
    arch = FAMILIES[config.family]
    if arch == "qwen2" and config.heads * config.head_dim != config.embed:
        arch = "llama"  # which takes biases and any head size; llama.cpp's qwen2 does not
    plain = {f.name: f.default for f in dataclasses.fields(DecoderConfig)}
    wrong = [name for name in plain if name not in EXPRESSIBLE and getattr(config, name) != plain[name]]
    if config.attn_scale is not None and np.isclose(config.attn_scale, config.head_dim**-0.5):
        wrong.remove("attn_scale")
    if config.windows and not any(config.windows):
        wrong.remove("windows")
    if config.family == "qwen2":
        biases = {"qkv_bias": True, "o_bias": False, "mlp_bias": False}
        wrong += [name for name, built in biases.items() if getattr(config, name) is not built]
    if config.head == "none" and not config.tied:
        wrong.append("head")
    if wrong:
        said = ", ".join(f"{name} = {getattr(config, name)!r}" for name in wrong)
        raise ConfigError(f"llama.cpp's architecture {arch!r} cannot express {said}.")
    if config.rope.interleaved or config.rope.dim != config.head_dim or not config.rope.truncate:
        raise ConfigError(
            f"llama.cpp's architecture {arch!r} turns whole heads, first half with second; here: {config.rope}."
        )
    return arch


def shape_metadata(config: DecoderConfig, arch: str) -> dict[str, object]:
    """The architecture's own metadata: sizes, rope, eps."""
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.embed,
        "block_count": config.layers,
        "feed_forward_length": config.mlp,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,  # a sliced model's is not embed / heads
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rope.dim,
        "rope.freq_base": float(config.rope.theta),
    }
    return {f"{arch}.{key}": value for key, value in (sizes | rope_metadata(config.rope)).items()}


def _check_free(path: Path) -> None:
    if not path.exists():
        return
    try:
        ours = path.is_file() and MARK in open_gguf(path).metadata
    except CheckpointError:
        ours = False
    if not ours:
        raise RunError(f"{path} is there and is not an export of mlfs_jax: choose another name, or remove it.")


def _plan(model: Model, dtype: str, values_f16: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor -> (shape, type), in the order of the file: that of :func:`_contents`."""
    plan: dict[str, tuple[tuple[int, ...], str]] = {}
    if model.decoder.rope.scaling == "llama3":
        plan[ROPE_FREQS] = ((model.decoder.rope.dim // 2,), "F32")
    values_f16 = values_f16 and model.decoder.kv_heads < model.decoder.heads
    for name, leaf in _ordered(model):
        shape = hf_shape(name, leaf.axes, leaf.shape)
        kind = "F32" if len(shape) == 1 else dtype.upper()
        if kind == "Q8_0" and (shape[-1] % BLOCK or (name == "layers.v.kernel" and values_f16)):
            kind = "F16"
        plan |= dict.fromkeys(tensor_names(name, leaf.axes, leaf.shape), (shape, kind))
    return plan


def _contents(model: Model, arch: str) -> Iterator[np.ndarray]:
    """The tensors of a file, as llama.cpp has them; one stacked weight in memory at a time."""
    config = model.decoder
    if config.rope.scaling == "llama3":
        yield llama3_factors(config.rope)
    for name, leaf in _ordered(model):
        for theirs in to_theirs(name, leaf.axes, np.asarray(leaf[...])):
            if permuted(arch, name):
                theirs = permute(theirs, config.heads if name.startswith("layers.q.") else config.kv_heads)
            yield theirs


def _ordered(model: Model) -> list:
    sites = list(SITES)
    return sorted(flatten(model.base).items(), key=lambda item: sites.index(item[0].rpartition(".")[0]))


def _write(path: str, arch: str, metadata: dict, plan: dict, contents: Iterator[np.ndarray]) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, arch)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for key, (shape, kind) in plan.items():
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            nbytes = math.prod(shape) // block * size
            writer.add_tensor_info(key, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (key, (_, kind)), tensor in zip(plan.items(), contents, strict=True):
            writer.write_tensor_data(_encode(key, tensor, kind))
    finally:
        writer.close()


def _encode(key: str, tensor: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    tensor = np.ascontiguousarray(tensor, np.float32)
    if kind == "F16" and np.abs(tensor).max() > np.finfo(np.float16).max:
        raise CheckpointError(f"{key} has weights up to {np.abs(tensor).max():g}, too large for F16: write it as bf16.")
    return tensor if kind == "F32" else quantize(tensor, GGMLQuantizationType[kind])


def _add(writer, key: str, value: object) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    next(add for kind, add in kinds.items() if isinstance(value, kind))(key, value)
