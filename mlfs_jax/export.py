"""From a run to a folder for others: a subnet as a Hugging Face checkpoint, or the maxnet's adapter for ``peft``.

Beside the checkpoint lies ``mlfs.json``, its origin: the run's config, the subnet, and hashes of what it was made from
and of what was written. :mod:`mlfs_jax.verify` holds the folder against it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlfs_jax.errors import RunError
from mlfs_jax.hf.export import ORIGIN, ExportReport, export_hf
from mlfs_jax.hf.gguf import gguf_in
from mlfs_jax.hf.gguf_write import GGUFReport, export_gguf
from mlfs_jax.hf.peft import PeftReport, export_peft
from mlfs_jax.importance import reorder, reorder_lora
from mlfs_jax.palette import Palette, short
from mlfs_jax.registry import ENTRIES, sha256_of
from mlfs_jax.run import write_json
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet
from mlfs_jax.train import Fitted

FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """Where an exported folder comes from.

    Attributes:
        run: name of the run's folder.
        config: the run's config, see :func:`public_config`.
        name: what the subnet was asked for by.
        fingerprint: of the run, see :func:`fingerprint`.
        files: sha256 of each file that was written.
    """

    run: str
    config: dict
    name: str
    subnet: Subnet
    fingerprint: dict[str, str]
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        write_json(directory / ORIGIN, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, directory: str | Path) -> Origin:
        """Raises RunError when the folder is none that ``mlfs export`` wrote, or its ``mlfs.json`` is damaged."""
        file = Path(directory).expanduser() / ORIGIN
        if not file.is_file():
            raise RunError(f"{directory} has no {ORIGIN}: give a folder that `mlfs export RUN --subnet ...` wrote.")
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**(saved | {"subnet": Subnet.from_json(saved["subnet"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunError(f"{file} is damaged ({e!r}): export again.") from e


def public_config(fitted: Fitted) -> dict:
    """A run's ``FitConfig`` as JSON has it, without the folders of this machine: an export may be published."""
    config = json.loads(json.dumps(dataclasses.asdict(fitted.config)))
    return config | {"model": short(config["model"]), "task": short(config["task"])}


def fingerprint(fitted: Fitted) -> dict[str, str]:
    """sha256 of what decides a run's weights beside its base: ``"order"`` and ``"adapters"``, all finished stages."""
    order, adapters = hashlib.sha256(), hashlib.sha256()
    if fitted.order is not None:
        order.update(json.dumps(fitted.order.to_json()).encode())
    for stage in fitted.stages:
        for site, entry in sorted(stage.items()):
            for leaf, value in sorted(entry.items()):
                adapters.update(f"{site}/{leaf}".encode() + np.asarray(value).tobytes())
    return {"order": order.hexdigest(), "adapters": adapters.hexdigest()}


def export_subnet(
    fitted: Fitted, subnet: str, directory: str | Path, *, run: str = "run", palette: Palette | None = None
) -> ExportReport:
    """Write a subnet of a run as a Hugging Face checkpoint, with tokenizer, model card and origin.

    Args:
        subnet: what ``fitted.space.named`` understands: ``"quarter"``, or ``"heads=6,mlp=736,depth=3"``.
        run: name of the run's folder, for people.
        palette: measured numbers for the model card, if there are any.

    Raises:
        UnknownNameError, SubnetError: no such name; sizes that the space does not contain.
        RunError: the folder holds something that is not an export.
    """
    chosen = fitted.space.named(subnet)
    report = export_hf(
        slice_subnet(fitted.merged, chosen),
        directory,
        label_names=fitted.task.labels or None,
        sliced_from=fitted.model.config,
        card=_card(fitted, subnet, chosen, palette),
    )
    hashes = {name: sha256_of(report.directory / name) for name in report.files}
    Origin(run, public_config(fitted), subnet, chosen, fingerprint(fitted), hashes).write(report.directory)
    return report


def export_subnet_gguf(fitted: Fitted, subnet: str, file: str | Path, dtype: str = "f16") -> GGUFReport:
    """Write a subnet of a run as a GGUF file, for llama.cpp and what is built on it.

    Args:
        subnet: as in :func:`export_subnet`.
        dtype: "f16", "bf16", "q8_0" or "f32", of the matrices.

    Raises:
        ConfigError: of another family than Llama or Qwen2.
        RunError: the file is no export, or the model of the run itself.
    """
    base, file = Path(fitted.config.model).expanduser(), Path(file).expanduser()
    if base.exists() and (used := gguf_in(base)) is not None and used.resolve() == file.resolve():
        raise RunError(f"{file} is the model that this one is made from, and runs need it: choose another name.")
    small = slice_subnet(fitted.merged, fitted.space.named(subnet))
    return export_gguf(small, file, dtype, name=f"{short(fitted.config.model)} {subnet}")


def export_adapter(fitted: Fitted, directory: str | Path) -> PeftReport:
    """Write the sum of a run's stages as a PEFT adapter of the pretrained model, in that model's own order of units."""
    model, lora = fitted.model, fitted.lora
    if fitted.order is not None:
        back = fitted.order.inverse()
        model, lora = reorder(model, back), reorder_lora(model, lora, back)
    known = any(entry.name == fitted.config.model for entry in ENTRIES)  # peft does not know the catalogue's names
    base = str(model.source) if known or Path(fitted.config.model).expanduser().is_dir() else fitted.config.model
    return export_peft(model, lora, directory, base_model_name=base)


def licence_of(model: str, source: Path | None) -> str:
    """Licence of a pretrained model: as the catalogue or its own model card says, else "unknown"."""
    for entry in ENTRIES:
        if entry.name == model:
            return entry.licence
    card = source / "README.md" if source is not None else None
    if card is not None and card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:4000]
        if found := re.search(r"^license:\s*[\"']?([\w.+-]+)", head, re.MULTILINE):
            return found.group(1)
    return "unknown"


def _data_note(task: str) -> str:
    for entry in ENTRIES:
        if entry.kind == "data" and entry.name == task.partition("-")[0]:
            return f" The data of the task (`{entry.package}` {entry.version}) are under: {entry.licence}."
    return ""


def _card(fitted: Fitted, name: str, subnet: Subnet, palette: Palette | None) -> str:
    """The part of the model card that the run knows."""
    config, task, base = fitted.config, fitted.task, short(fitted.config.model)
    steps = ", ".join(f"{stage.steps} steps of rank {stage.rank}" for stage in config.stages)
    lines = [
        "## How it was made",
        "",
        f"Subnet `{name}` ({subnet}) of a supernet over `{base}`. Its weights stayed frozen; "
        f"{len(fitted.stages)} stages of LoRA ({steps}, "
        f"{config.batch_size} examples each{_limit(config.limit)}) were trained for the task `{short(task.name)}`"
        + (f" ({task.description})" if task.description else "")
        + " and are merged in here. Texts are cut to "
        f"{config.max_length or task.max_length} tokens.",
    ]
    if task.labels:
        lines += ["", "Labels: " + ", ".join(f"{i} {label}" for i, label in enumerate(task.labels)) + "."]
    lines += ["", "## Numbers", ""]
    row = palette.row(subnet) if palette is not None else None
    if row is None:
        lines.append("Not measured (`mlfs palette` on the run, then export again).")
    else:
        top = palette.rows[0]
        lines += [
            f"On {palette.examples:,} examples of the {palette.split} split; FLOPs and latency at {palette.length} "
            f"tokens, on {palette.device}. Sizes, FLOPs and latency are of the subnet itself"
            + (", before the padding above." if row.params_exported != row.params else "."),
            "",
            f"| | {name} | maxnet |",
            "|---|---|---|",
            f"| {palette.metric} | {row.score:.4f} | {top.score:.4f} |",
            f"| loss | {row.loss:.4f} | {top.loss:.4f} |",
            f"| parameters without embeddings | {row.params_body:,} | {top.params_body:,} |",
            f"| GFLOPs, one sequence | {row.flops / 1e9:.4g} | {top.flops / 1e9:.4g} |",
            *_latencies(row.latency_ms, top.latency_ms),
            *(
                f"| tokens/s at batch {size} | {row.tokens_per_s[size]:.3g} | {top.tokens_per_s[size]:.3g} |"
                for size in row.tokens_per_s
            ),
        ]
        if palette.baseline:
            lines += ["", f"Always answering the commonest class scores {palette.baseline:.4f}."]
    licence = licence_of(config.model, fitted.model.source)
    lines += [
        "",
        "## Licence",
        "",
        f"The weights derive from `{base}`, whose licence is: {licence}.{_data_note(task.name)}",
    ]
    return "\n".join(lines)


def _limit(limit: int | None) -> str:
    return f", at most {limit:,} of each split" if limit else ""


def _latencies(ours: Mapping[int, float], top: Mapping[int, float]) -> list[str]:
    return [f"| ms at batch {size} | {ours[size]:.3g} | {top[size]:.3g} |" for size in ours]
