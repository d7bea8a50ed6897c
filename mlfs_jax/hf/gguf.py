"""GGUF files of the Llama and Qwen2 architectures -> Model, one tensor in memory at a time.

A GGUF holds weights, shape, tokenizer and chat template in one file. :func:`read_gguf` makes a model of it;
:func:`prepare_folder` a folder with the tokenizer files and config.json that everything else expects of a model.
Names and meanings follow llama.cpp (gguf-py's constants.py, src/models/llama.cpp).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mlfs_jax.backbone.tree import STACKED, flatten
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import CheckpointError, ConfigError, RunError, some
from mlfs_jax.hf.configs import to_hf
from mlfs_jax.hf.gguf_file import GGUFFile, open_gguf
from mlfs_jax.hf.gguf_rope import ROPE_FREQS, read_rope, shortest
from mlfs_jax.hf.gguf_tokenizer import tokenizer_files
from mlfs_jax.hf.table import LEAVES, hf_shape, to_ours
from mlfs_jax.model import Model, abstract, build
from mlfs_jax.registry import cache_dir

ARCHITECTURES = ("llama", "qwen2")
"""general.architecture that are built here; also names of our families."""

SITES = {
    "embed.tokens": "token_embd",
    "layers.attn_norm": "blk.{layer}.attn_norm",
    "layers.q": "blk.{layer}.attn_q",
    "layers.k": "blk.{layer}.attn_k",
    "layers.v": "blk.{layer}.attn_v",
    "layers.o": "blk.{layer}.attn_output",
    "layers.mlp_norm": "blk.{layer}.ffn_norm",
    "layers.gate": "blk.{layer}.ffn_gate",
    "layers.up": "blk.{layer}.ffn_up",
    "layers.down": "blk.{layer}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
"""Our site -> llama.cpp's module."""

FOLDER_VERSION = b"1"  # of what prepare_folder writes: a new number makes the folders anew


def gguf_in(path: str | Path) -> Path | None:
    """The GGUF file that ``path`` stands for: itself, or the only one of a folder without safetensors; else None.

    Raises:
        CheckpointError: the folder holds several.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{path} holds {len(files)} GGUF files, {some(file.name for file in files)}: give the path of one of them."
        )
    return files[0] if files else None


def read_gguf(path: str | Path | GGUFFile, *, head: str = "lm", dtype=jnp.float32, place=None, **fields) -> Model:
    """The model in a GGUF file, dequantised.

    Args:
        head: "lm", or "none" (hidden states).
        dtype: of the weights in memory.
        place: called with each weight (numpy), its dotted name and its abstract Param; returns the array of the model.
            None: ``jnp.asarray``.
        fields: of :class:`mlfs_jax.model.Model`.

    Raises:
        CheckpointError: the file is no GGUF, cut short, or has a tensor missing, unknown, mis-shaped or of a type that
            is not read; the message names it.
        ConfigError: an architecture, a rope scaling or a switch that is not built here.
    """
    if head not in ("lm", "none"):
        raise ConfigError(f"head = {head!r}: a GGUF holds a language model; expected 'lm' or 'none'.")
    file = path if isinstance(path, GGUFFile) else open_gguf(path)
    config = config_of(file).replace(head=head)
    names = {name: tensor_names(name, spec.axes, spec.shape) for name, spec in flatten(abstract(config)[1]).items()}
    _account(file, {key for keys in names.values() for key in keys})
    weights: dict[str, Array] = {}
    for name, spec in flatten(abstract(config)[1]).items():
        value = _read_weight(file, config, name, names[name], spec, np.dtype(dtype))
        weights[name] = jnp.asarray(value) if place is None else place(value, name, spec)
    return build(config, weights, **({"name": file.path.stem} | fields))


def config_of(file: GGUFFile) -> DecoderConfig:
    """What network a file's metadata describes."""
    meta = file.metadata
    if (parts := meta.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{file.path} is one of {parts} parts of a model: join them with llama.cpp's `llama-gguf-split --merge`."
        )
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        near = difflib.get_close_matches(str(arch), ARCHITECTURES, n=1, cutoff=0.0)
        raise ConfigError(
            f"{file.path} is of the GGUF architecture {arch!r}; read here are {', '.join(ARCHITECTURES)} (nearest: "
            f"{near[0]!r}). Other families are read from their Hugging Face checkpoints."
        )
    for key in ("expert_count", "attention.sliding_window", "attention.scale", "logit_scale", "residual_scale"):
        if meta.get(f"{arch}.{key}"):
            raise ConfigError(f"{file.path} has {arch}.{key} = {meta[f'{arch}.{key}']!r}, which is not built here.")
    if meta.get(f"{arch}.attention.causal") is False:
        raise ConfigError(f"{file.path} has {arch}.attention.causal = False: an encoder, expected a decoder.")

    def field(key: str, kind: type = int, default=None):
        value = meta.get(f"{arch}.{key}", default)
        if isinstance(value, list) and value:
            if any(v != value[0] for v in value):
                raise ConfigError(f"{file.path}: {arch}.{key} differs between layers, {value}: not built here.")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise CheckpointError(f"{file.path} has {arch}.{key} = {value!r}: expected a number.")
        return kind(value)

    embed, heads = field("embedding_length"), field("attention.head_count")
    kv_heads = field("attention.head_count_kv", default=heads)
    if min(heads, kv_heads, embed) < 1:
        raise CheckpointError(f"{file.path}: {heads} heads, {kv_heads} kv heads, {embed} channels: expected some.")
    head_dim = field("attention.key_length", default=embed // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(key, default=head_dim) != head_dim:
            raise ConfigError(f"{file.path}: {arch}.{key} is not the head size {head_dim}, as {arch} has it.")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight.")
    context = field("context_length")
    biased = [site for site in ("attn_q", "attn_output", "ffn_up") if f"blk.0.{site}.bias" in file.tensors]
    eos = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    pad = meta.get("tokenizer.ggml.padding_token_id", eos[0])
    return DecoderConfig(
        family="qwen2" if biased == ["attn_q"] else arch,  # a slice of Qwen2 is written as a llama with biases
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        embed=embed,
        layers=field("block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=field("feed_forward_length"),
        max_positions=context,
        rope=read_rope(file, field("rope.freq_base", float, 10_000.0), head_dim, context),
        norm_eps=shortest(field("attention.layer_norm_rms_epsilon", float)),
        qkv_bias="attn_q" in biased,
        o_bias="attn_output" in biased,
        mlp_bias="ffn_up" in biased,
        tied="output.weight" not in file.tensors,
        pad_token_id=0 if pad is None else pad,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(e for e in eos if e is not None)),
    )


def tensor_names(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """The tensors that hold our weight ``name``: one, or one for each layer."""
    site, _, leaf = name.rpartition(".")
    tensor = f"{SITES[site]}.{LEAVES[leaf]}"
    return [tensor.format(layer=i) for i in range(shape[0])] if axes[0] == STACKED else [tensor]


def _account(file: GGUFFile, wanted: set[str]) -> None:
    """Every tensor of the file has a place, and every weight its tensor."""
    known = wanted | {ROPE_FREQS, "output.weight"}  # output: not wanted with head "none"
    strange = sorted(file.tensors.keys() - known)
    missing = sorted(wanted - file.tensors.keys())
    for what, names in (("lacks", missing), ("has tensors that are not built here:", strange)):
        if names:
            raise CheckpointError(f"{file.path} {what} {some(names)} ({len(names)} in all).")


def _read_weight(file: GGUFFile, config: DecoderConfig, name: str, keys: list[str], spec, dtype) -> np.ndarray:
    stacked = spec.axes[0] == STACKED
    expected = hf_shape(name, spec.axes, spec.shape)
    value = np.empty(spec.shape, dtype)
    for i, key in enumerate(keys):
        tensor = file.tensors[key]
        if tensor.shape != expected:
            raise CheckpointError(f"{key} in {file.path} has shape {tensor.shape}; its metadata make it {expected}.")
        theirs = file.read(key)
        if permuted(file.metadata["general.architecture"], name):
            theirs = unpermute(theirs, config.heads if name.startswith("layers.q.") else config.kv_heads)
        value[i if stacked else ...] = to_ours(name, spec.shape[1:] if stacked else spec.shape, theirs)
    return value


def permuted(arch: str, name: str) -> bool:
    """Whether llama.cpp has the rows of this weight in another order: channels that turn together side by side."""
    return arch == "llama" and name.startswith(("layers.q.", "layers.k."))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the [heads * head_dim, ...] rows of Q or K -> Hugging Face's."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of :func:`unpermute`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def prepare_folder(path: str | Path | GGUFFile, *, cache: str | Path | None = None) -> Path:
    """A folder with config.json, tokenizer.json and tokenizer_config.json of a GGUF file; made once, in one rename.

    It also links to the file (``model.gguf``), so it is a model folder like any other.

    Args:
        cache: where to keep it; None: the package's cache.

    Raises:
        CheckpointError: the file cannot be read, or its tokenizer is missing or not of a kind that is read here.
        RunError: the folder cannot be written.
    """
    file = path if isinstance(path, GGUFFile) else open_gguf(path)
    target_file = file.path.resolve()
    digest = hashlib.sha256(FOLDER_VERSION + os.fsencode(target_file) + file.header).hexdigest()[:12]
    root = Path(cache).expanduser() if cache is not None else cache_dir() / "gguf"
    folder = root / f"{target_file.stem}-{digest}"
    if folder.is_dir():
        return folder
    files = {"config.json": to_hf(config_of(file)), **tokenizer_files(file.metadata, file.path)}
    try:
        _make_folder(folder, files, target_file)
    except OSError as error:
        raise RunError(
            f"{folder} could not be made ({error}): make room, or set MLFS_CACHE to another folder."
        ) from error
    return folder


def _make_folder(folder: Path, files: dict[str, dict], link: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        for name, content in files.items():
            (fresh / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        (fresh / "model.gguf").symlink_to(link)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: its files are as good
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
