"""Model -> Hugging Face directory: config.json, safetensors, tokenizer, model card; in one rename."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Config
from mlfs_jax.errors import CheckpointError, RunError, first_line, some
from mlfs_jax.hf.card import model_card
from mlfs_jax.hf.configs import to_hf
from mlfs_jax.hf.families import FAMILIES
from mlfs_jax.hf.load import INDEX, SINGLE
from mlfs_jax.hf.reshape import fit_weights, nearest_fit, why
from mlfs_jax.model import Model, abstract

REPORT = "mlfs_export.json"
"""The report beside the weights; it also marks a folder as one that a new export may replace."""

ORIGIN = "mlfs.json"
"""Written beside an export of a run, see :class:`mlfs_jax.export.Origin`."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what it cost to say it in Hugging Face's terms.

    Attributes:
        directory: where it is.
        files: what is in it.
        sliced: config field -> (size in the model it was sliced from, size here), where they differ and where the
            exporter was told.
        padded: config field -> (size of the model, size in the export), where Hugging Face needs another one.
        why: one sentence on each repair; empty when the shape is expressible as it is.
        params_before: parameters of the model.
        params_after: parameters of the export.
        copies: how often each channel of the residual stream is repeated. Above 1, hidden states and pooler output hold
            the model's channels that many times over; logits are the model's own, to rounding, whatever was padded.
    """

    directory: Path
    files: tuple[str, ...]
    sliced: dict[str, tuple[int, int]]
    padded: dict[str, tuple[int, int]]
    why: tuple[str, ...]
    params_before: int
    params_after: int
    copies: int = 1

    def to_json(self) -> dict:
        return dataclasses.asdict(self) | {"directory": self.directory.name}


def export_hf(
    model: Model,
    directory: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    label_names: Sequence[str] | None = None,
    sliced_from: Config | None = None,
    max_shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> ExportReport:
    """Write a model, sliced or whole, so that ``transformers`` opens it with ``from_pretrained``.

    The folder appears in one rename. An earlier export there is replaced; anything else is left alone.

    Args:
        tokenizer_from: folder with tokenizer files to copy; None: ``model.source``, if it has any.
        label_names: C names for ``id2label``; None: ``model.label_names``, if it has any.
        sliced_from: config of the model that this one is a slice of, for the report and the card.
        max_shard_bytes: weights beyond this are split over several files with an index.
        card: Markdown for the model card, after what it says of itself: the numbers of an evaluation.

    Raises:
        ConfigError: the family cannot express the model, for another reason than the width of its heads.
        RunError: the folder holds something that is not an export, or the model that this one is made from, or cannot
            be made.
        CheckpointError: ``tokenizer_from`` has no tokenizer.
    """
    directory = Path(directory).expanduser().absolute()  # so that "." has a name
    _check_free(directory)
    if model.source is not None and directory.resolve() == model.source.resolve():
        raise RunError(f"{directory} is the model that this one is made from, and runs need it: choose another folder.")
    tokenizer = _tokenizer_files(tokenizer_from, model.source)
    fit = nearest_fit(model.config)
    config, weights = fit.config, fit_weights(model, fit)
    hf = to_hf(config, label_names=model.label_names if label_names is None else label_names)
    hf["dtype"] = str(weights["embed.tokens.table"].dtype)

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.resolve().parent))
    except OSError as error:
        raise RunError(f"cannot make the folder {directory}: {error.strerror}.") from error
    try:
        fresh.chmod(0o755)  # mkdtemp's own is for this user only
        files = ["config.json", *_write_weights(fresh, config, weights, max_shard_bytes)]
        (fresh / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        for path in tokenizer:
            shutil.copyfile(path, fresh / path.name)
            files.append(path.name)
        files += ["README.md", REPORT]
        report = ExportReport(
            directory=directory,
            files=tuple(files),
            sliced=_changes(sliced_from, model.config),
            padded=_changes(model.config, config),
            why=why(model.config, fit),
            params_before=model.num_params,
            params_after=sum(weight.size for weight in weights.values()),
            copies=fit.copies,
        )
        (fresh / "README.md").write_text(model_card(model, config, report, card), encoding="utf-8")
        (fresh / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        _replace(fresh, directory)
    except (OSError, SafetensorError) as e:
        raise RunError(f"{directory} could not be written: {first_line(e)}.") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def _check_free(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / REPORT).is_file()):
        raise RunError(
            f"{directory} holds something that is not an export of mlfs_jax (no {REPORT}): choose another "
            "folder, or empty this one."
        )
    there = {path.name for path in directory.iterdir()}
    try:
        ours = set(json.loads((directory / REPORT).read_text(encoding="utf-8"))["files"]) if there else set()
    except (ValueError, KeyError, TypeError):  # a damaged report: nothing but itself is known to be ours
        ours = set()
    if others := sorted(there - ours - {REPORT, "README.md", ORIGIN}):
        raise RunError(
            f"{directory} holds more than an export of mlfs_jax, and a new one would delete it: {some(others)}. Move "
            "that away, or choose another folder."
        )


def _tokenizer_files(asked: str | Path | None, source: Path | None) -> list[Path]:
    folder = Path(asked).expanduser() if asked is not None else source
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder is not None else []
    if asked is not None and not files:
        raise CheckpointError(f"tokenizer_from = {folder}: there is none of {', '.join(TOKENIZER_FILES)}.")
    return files


def _write_weights(folder: Path, config: Config, weights: dict[str, np.ndarray], max_shard_bytes: int) -> list[str]:
    """Write the safetensors files, one shard in memory at a time; returns their names."""
    slots = FAMILIES[config.family].slots(flatten(abstract(config)[1]), config.head)
    shards: list[list[tuple[int, int]]] = [[]]  # (which slot, which of its tensors)
    room, total = max_shard_bytes, 0
    for n, slot in enumerate(slots):
        size = sum(weights[name].nbytes for name in slot.names) // len(slot.keys)
        for i in range(len(slot.keys)):
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((n, i))
            room -= size
            total += size
    many = len(shards) > 1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        turned = {n: slots[n].to_theirs(weights) for n in {n for n, _ in shard}}
        tensors = {slots[n].keys[i]: turned[n][i] for n, i in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file's own is for this user only
        weight_map |= dict.fromkeys(tensors, file)
    if many:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(INDEX)
    return names


def _replace(fresh: Path, directory: Path) -> None:
    """Move ``fresh`` to ``directory``; an earlier export leaves only once the new one is whole."""
    directory = directory.resolve()  # of a link, what it leads to
    if directory.exists():
        _check_free(directory)  # it may have changed meanwhile
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        if directory == Path.cwd():  # whoever stands in it would stand in the old one: only what it holds is moved
            for path in list(directory.iterdir()):
                path.rename(old / path.name)
            for path in sorted(fresh.iterdir(), key=lambda path: path.name != REPORT):  # half of it is known as ours
                path.rename(directory / path.name)
        else:
            directory.rename(old)
            fresh.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(directory)


def _changes(before: Config | None, after: Config) -> dict[str, tuple[int, int]]:
    if before is None:
        return {}
    sizes = ("embed", "layers", "heads", "kv_heads", "head_dim", "mlp")
    pairs = {f: (getattr(before, f), getattr(after, f)) for f in sizes if hasattr(after, f)}
    return {f: (a, b) for f, (a, b) in pairs.items() if a != b}
