"""Hugging Face checkpoint -> Model: every key accounted for, one weight in memory at a time, no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from mlfs_jax.backbone.quantised import Quantised, check_bits, quantise_weight
from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.data.tokenizer import named_end
from mlfs_jax.errors import CheckpointError, ConfigError, DataError, some
from mlfs_jax.hf.configs import family_of, from_hf, label_names, own_labels
from mlfs_jax.hf.gguf import gguf_in, prepare_folder, read_gguf
from mlfs_jax.hf.gguf_file import open_gguf
from mlfs_jax.hf.table import LEAVES, DecoderFamily, Family
from mlfs_jax.hosts import to_host
from mlfs_jax.model import Model, abstract, as_key, build, check_dtype, init_weights
from mlfs_jax.registry import ADAPTER, TEXT_FILES, resolve_model

log = logging.getLogger("mlfs_jax")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

USES = {"lm": "write texts", "sequence": "label texts", "token": "label tokens", "mlm": "fill in tokens"}
"""What a head is for."""

Placement = jax.sharding.Sharding | Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""One sharding for every weight, or a function of the names of its axes and its shape
(``partial(sharding_of, mesh)``, see :mod:`mlfs_jax.sharding`)."""


@dataclass(frozen=True)
class LoadReport:
    """What loading did beyond copying.

    Attributes:
        directory: the checkpoint.
        files: weight files that were read.
        initialised: our weights that the checkpoint lacks, freshly initialised (a new head).
        dropped: keys of the checkpoint that belong to another head.
    """

    directory: Path
    files: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.directory}: read {', '.join(self.files)}"]
        if self.initialised:
            parts.append(f"newly initialised: {', '.join(self.initialised)}")
        if self.dropped:
            parts.append(f"dropped (other heads): {', '.join(self.dropped)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint, not read yet."""

    key: str
    file: str
    handle: Any  # of safe_open

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.key).get_shape())

    def read(self, dtype: DTypeLike) -> np.ndarray:
        holds = self.handle.get_slice(self.key).get_dtype()
        if holds not in ("F16", "BF16", "F32", "F64"):
            raise CheckpointError(
                f"{self.key} in {self.file} holds {holds}: expected floating point weights of 16 bits or more; "
                "quantised checkpoints are not read here."
            )
        return self.handle.get_tensor(self.key).astype(dtype)


def from_pretrained(
    name_or_path: str | Path,
    *,
    head: str | None = None,
    labels: int | None = None,
    problem: str | None = None,
    key: int | Array = 0,
    dtype: DTypeLike = jnp.float32,
    base_bits: int = 32,
    sharding: Placement | None = None,
) -> Model:
    """A pretrained model: a name of the catalogue, a hub id, a local Hugging Face directory, or a GGUF file.

    Args:
        head: "none", "sequence", "token" or "mlm", for a decoder "none" or "lm"; None keeps the checkpoint's own.
            Another head than its own keeps the backbone and starts a new head.
        labels: outputs of a sequence or token head; None keeps the checkpoint's own count.
        problem: "classification" or "regression" for a sequence head; None keeps the checkpoint's own.
        key: seed or key for weights that the checkpoint lacks.
        dtype: of the weights in memory, whatever the checkpoint stores.
        base_bits: 8 or 4: :meth:`Model.quantise`, weight by weight, so that there never is a whole float base.
        sharding: where each weight goes, see :data:`Placement`; nothing is gathered on one device first.

    What was newly initialised or dropped is logged (logger ``mlfs_jax``); :func:`load_checkpoint` returns it.

    Raises:
        UnknownNameError, DownloadError: the name cannot be resolved.
        ConfigError: config.json needs something that is not built here.
        CheckpointError: a key is unknown, missing, there twice, or mis-shaped; the message names it.
    """
    model, report = load_checkpoint(
        resolve_model(name_or_path),
        head=head,
        labels=labels,
        problem=problem,
        key=key,
        dtype=dtype,
        base_bits=base_bits,
        sharding=sharding,
        name=Path(name_or_path).name,
    )
    log.log(logging.WARNING if report.initialised else logging.INFO, "%s", report)
    return model.replace(name=Path(name_or_path).name)


def model_folder(name_or_path: str | Path) -> Path:
    """A folder with the config.json and the tokenizer of a model; of a hub id, the weights are not downloaded.

    Raises as :func:`from_pretrained` does.
    """
    path = resolve_model(name_or_path, files=TEXT_FILES)
    return path if (gguf := gguf_in(path)) is None else prepare_folder(gguf)


def load_checkpoint(
    directory: str | Path,
    *,
    head: str | None = None,
    labels: int | None = None,
    problem: str | None = None,
    key: int | Array = 0,
    dtype: DTypeLike = jnp.float32,
    base_bits: int = 32,
    sharding: Placement | None = None,
    name: str | None = None,
) -> tuple[Model, LoadReport]:
    """:func:`from_pretrained` for a local directory, with the report; ``name`` is what messages call the model."""

    def place(value: np.ndarray, name: str, spec: nnx.Param) -> Array | Quantised:
        return quantise_weight(name, spec, _place(value, spec.axes, sharding), base_bits)

    check_bits(base_bits)
    check_dtype(dtype)
    directory = Path(directory).expanduser()
    name = name or directory.name
    if (gguf := gguf_in(directory)) is not None:
        _check_use(name, "GGUF", True, head)
        if labels is not None or problem is not None:
            raise ConfigError(f"labels = {labels}, problem = {problem!r}: {gguf} is a language model and has neither.")
        file = open_gguf(gguf)
        source = prepare_folder(file)
        model = read_gguf(file, head=head or "lm", dtype=dtype, place=place, source=source)
        return model, LoadReport(source, (gguf.name,), (), ())
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory} holds a PEFT adapter ({ADAPTER}) beside its weights, and transformers would apply it: either "
            "merge it once (AutoPeftModelForCausalLM, or the class of your head, .from_pretrained(dir)"
            ".merge_and_unload().save_pretrained(elsewhere)), or take the adapter's files away."
        )
    hf = read_config(directory)
    family = family_of(hf)
    _check_use(name, family.name, isinstance(family, DecoderFamily), head)
    with ExitStack() as stack:
        tensors, files = _open(directory, family, stack)
        config = from_hf(
            hf, head=head, labels=labels, problem=problem, pooler=any(key.startswith("pooler.") for key in tensors)
        )
        if isinstance(config, DecoderConfig):
            config = _with_ends(config, hf, directory)
        fresh = _fresh_sites(hf, family, config, tensors)

        specs = flatten(abstract(config)[1])
        weights: dict[str, Array | Quantised] = {}
        initialised: list[str] = []
        missing: list[str] = []
        used: set[str] = set()
        for slot in family.slots(specs, config.head):
            if slot.names[0].rpartition(".")[0] in fresh:
                initialised += slot.names
                continue
            found = [tensors.get(family.canonical(key)) for key in slot.keys]
            if None in found:
                missing += [key for key, tensor in zip(slot.keys, found, strict=True) if tensor is None]
                continue
            for tensor in found:
                if tensor.shape != slot.shape:
                    raise CheckpointError(
                        f"{tensor.key} in {directory / tensor.file} has shape {tensor.shape}; config.json makes it "
                        f"{slot.shape}."
                    )
            used.update(family.canonical(tensor.key) for tensor in found)
            for ours, value in slot.to_ours(tensor.read(dtype) for tensor in found).items():
                weights[ours] = place(value, ours, specs[ours])
        if missing:
            raise CheckpointError(
                f"{directory} lacks {some(missing)} ({len(missing)} in all); looked in {', '.join(files)}."
            )
        dropped = _account(tensors, used, family, weights, config.head, directory)

    if initialised:
        new = init_weights(config, as_key(key), tuple(initialised))
        for ours, fresh_one in new.items():
            weights[ours] = place(np.asarray(fresh_one, dtype), ours, specs[ours])
    report = LoadReport(directory, tuple(files), tuple(initialised), tuple(dropped))
    own = config.head in ("sequence", "token") and "head.out" not in fresh
    names = label_names(hf) if own else None
    return build(config, weights, name=directory.name, source=directory, label_names=names or None), report


def _check_use(name: str, kind: str, decoder: bool, head: str | None) -> None:
    """Raise `ConfigError` for an encoder that is to write, or a language model that is to label."""
    if head in USES and decoder != (head == "lm"):
        what, needed = "a language model", "an encoder, such as minilm-l6"
        if not decoder:
            what, needed = "an encoder", "a language model, such as smollm2-135m"
        raise ConfigError(f"{name} is {what} ({kind}): to {USES[head]} (head = {head!r}), give {needed}.")


def _with_ends(config: DecoderConfig, hf: dict, directory: Path) -> DecoderConfig:
    """The config with the other tokens that end its texts.

    Those of generation_config.json, where a chat model may name them; and the tokenizer's, which ends the texts of
    training (:func:`mlfs_jax.data.tokenizer.specials`) where config.json has none.
    """
    found = list(config.eos_token_ids)
    file = directory / "generation_config.json"
    if file.is_file():
        ends = read_config(file).get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends or []
        if not (isinstance(ends, list) and all(isinstance(end, int) for end in ends)):
            raise ConfigError(f"eos_token_id = {ends!r} in {file}: expected a token id, or a list of them.")
        found += ends
    if hf.get("eos_token_id") is None:
        with suppress(DataError):  # a model may come without a usable tokenizer
            end = named_end(directory)
            found += [] if end is None else [end]
    return config.replace(eos_token_ids=tuple(dict.fromkeys(found)))


def read_config(path: Path) -> dict:
    """config.json of a checkpoint's folder, or a file of another name that holds one, as a dict."""
    if not path.is_file():
        folder, path = path, path / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no config.json: expected a Hugging Face model directory.")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(hf, dict):
        raise CheckpointError(f"{path} holds a {type(hf).__name__}: expected an object.")
    return hf


def _open(directory: Path, family: Family, stack: ExitStack) -> tuple[dict[str, _Tensor], list[str]]:
    """All tensors of a checkpoint by canonical key, unread; and the files they are in."""
    listed = None
    if (directory / SINGLE).is_file():
        files = [SINGLE]
    elif (directory / INDEX).is_file():
        try:
            listed = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({str(Path(file)) for file in listed.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / INDEX} has no readable weight_map: {error!r}.") from error
    else:
        hint = f"expected {SINGLE} or {INDEX}."
        if any(directory.glob("pytorch_model*.bin")):
            hint = (
                "it has pytorch_model.bin, a pickle, which is not read here. Convert it once where torch is "
                "installed: AutoModel.from_pretrained(dir).save_pretrained(dir)  (the class of your head, to keep it)."
            )
        raise CheckpointError(f"{directory} has no safetensors weights: {hint}")

    tensors: dict[str, _Tensor] = {}
    for file in files:
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / INDEX} lists {file}, which is not there: fetch it again.")
        try:
            handle = stack.enter_context(safe_open(directory / file, framework="np"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / file} cannot be read ({error}): fetch it again.") from error
        for key in handle.keys():  # noqa: SIM118 (a handle is not iterable)
            if listed is not None and key not in listed:
                raise CheckpointError(f"{key} in {directory / file} is not in {INDEX}.")
            canonical = family.canonical(key)
            if canonical in tensors:
                first = tensors[canonical]
                raise CheckpointError(
                    f"{key} in {directory / file} is there twice: {first.key} in {first.file} is the same weight."
                )
            tensors[canonical] = _Tensor(key, file, handle)
    if listed is not None:
        for key, file in listed.items():
            tensor = tensors.get(family.canonical(key))
            if tensor is None or tensor.key != key or tensor.file != file:
                raise CheckpointError(f"{INDEX} says {key} is in {directory / file}; it is not.")
    return tensors, files


def _fresh_sites(hf: dict, family: Family, config: Config, tensors: dict[str, _Tensor]) -> set[str]:
    """Sites of the head that start new, because the checkpoint's own head is another one.

    A module of the base model (BERT's pooler) is taken from any checkpoint that has it. Half a module is not new: its
    missing half will be reported as missing.
    """
    head, architectures = family.heads[config.head], hf.get("architectures")
    there = {site: any(f"{family.bare(m)}.{leaf}" in tensors for leaf in LEAVES.values()) for site, m in head.items()}
    if architectures:
        same = family.own_head(architectures) == config.head
    else:  # config.json does not say what it is: the tensors do
        same = any(there.values())
    if same:
        return set() if getattr(config, "labels", 0) in (0, own_labels(hf)) else {"head.out"}
    return {site for site, module in head.items() if not (module.startswith(family.prefix) and there[site])}


def _account(tensors, used, family, weights, head, directory) -> list[str]:
    """Keys that no weight used: tied copies are compared, other heads' are returned, the rest raises."""
    dropped, strange = [], []
    for canonical, tensor in tensors.items():
        if canonical in used or family.is_buffer(canonical):
            continue
        if canonical in family.tied and head in ("mlm", "lm"):
            ours = weights.get(family.tied[canonical])
            if ours is not None and not np.array_equal(tensor.read(ours.dtype), to_host(ours)):
                why = "an untied output layer is not built here."
                if head == "lm":
                    why = "for a head of its own, config.json must say tie_word_embeddings = false."
                raise CheckpointError(
                    f"{tensor.key} in {directory / tensor.file} differs from the weight it is tied to "
                    f"({family.tied[canonical]}): {why}"
                )
        elif family.is_foreign(canonical):
            dropped.append(tensor.key)
        else:
            strange.append(f"{tensor.key} in {tensor.file}, shape {tensor.shape}")
    if strange:
        raise CheckpointError(
            f"{directory} has {len(strange)} keys that no {family.name} of this config has: {some(strange)}."
        )
    return dropped


def _place(value: np.ndarray, axes: tuple[str, ...], sharding: Placement | None) -> Array:
    if sharding is None:
        return jnp.asarray(value)
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = sharding(axes, value.shape)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
