"""``mlfs info``: what a model, a run folder or an exported folder is, as plain data, and as text for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.errors import RunError
from mlfs_jax.export import Origin, licence_of
from mlfs_jax.hf.export import ORIGIN, REPORT
from mlfs_jax.hf.load import load_checkpoint
from mlfs_jax.model import Model
from mlfs_jax.palette import Palette, shape
from mlfs_jax.registry import ENTRIES, Entry, is_whole, resolve_model
from mlfs_jax.run import Run
from mlfs_jax.subnet import num_params
from mlfs_jax.train import load_run

MLP = ("layers.gate", "layers.up", "layers.down")


def _part(site: str) -> str:
    """Where a weight belongs, for people."""
    if site.startswith("embed"):
        return "embeddings"
    if "norm" in site.rpartition(".")[2]:
        return "norms"
    if site.startswith("layers."):
        return "mlp" if site in MLP else "attention"
    return "head"


def describe(thing: str) -> dict:
    """What ``thing`` is: a run folder, an exported folder, a name of the catalogue, a model folder, or a hub id.

    A name of the catalogue that is not in the cache is described without downloading it.

    Raises:
        UnknownNameError: it is none of these. RunError, CheckpointError: it is damaged.
    """
    path = Path(thing).expanduser()
    if (path / "run.json").is_file():
        return _describe_run(path)
    if (path / ORIGIN).is_file():
        return _describe_export(path)
    entry = next((entry for entry in ENTRIES if entry.name == thing), None)
    if entry is not None:
        return _describe_entry(entry)
    return _describe_model(thing, resolve_model(thing))


def _describe_model(name: str, folder: Path) -> dict:
    model, report = load_checkpoint(folder)
    described: dict[str, Any] = {
        "kind": "model",
        "name": name,
        "folder": str(folder),
        "licence": licence_of(name, folder),
    }
    described |= _model(model)
    if report.dropped:
        described["other heads in the files"] = list(report.dropped)
    return described


def _model(model: Model) -> dict:
    parts: dict[str, int] = {}
    for name, leaf in flatten(model.base).items():
        part = _part(name.rpartition(".")[0])
        parts[part] = parts.get(part, 0) + leaf.size
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if v is not None}
    return {"config": config, "parameters": {**parts, "total": model.num_params}}


def _describe_entry(entry: Entry) -> dict:
    folder = entry.cached
    cached = is_whole(folder, entry)
    described = {
        "kind": entry.kind,
        "name": entry.name,
        "description": entry.description,
        "licence": entry.licence,
        "source": f"{entry.package} {entry.version} ({entry.archive}, {entry.size / 1e6:.1f} MB)",
        "folder": str(folder) if cached else f"not in the cache: mlfs fetch {entry.name}",
        "files": list(entry.files),
    }
    if cached and entry.kind == "model":
        described |= _model(load_checkpoint(folder)[0])
    return described


def _describe_run(path: Path) -> dict:
    run, fitted = Run.open(path), load_run(path)
    model, space = fitted.model, fitted.space
    history = run.history()
    stages = []
    for i, stage in enumerate(fitted.config.stages):
        row = {"name": stage.name, "samples": stage.sample, "steps": stage.steps, "rank": stage.rank}
        if i < len(fitted.stages):
            lora = fitted.stages[i]
            sizes = {True: 0, False: 0}  # low-rank or whole
            for entry in lora.values():
                for leaf, value in entry.items():
                    sizes[leaf in ("a", "b")] += value.size
            row |= {"sites": sum("a" in entry for entry in lora.values())}
            row |= {"low-rank parameters": sizes[True], "whole parameters": sizes[False], "finished": True}
        else:
            row["finished"] = False
        stages.append(row)
    whole = num_params(model.config)
    palette = Palette.load(path)
    subnets = []
    for name, subnet in space.names().items():
        size = num_params(model.config, subnet)
        row = {"name": name, "layers×heads·mlp·embed": shape(subnet), "parameters without embeddings": size}
        row["share"] = round(size / whole, 3)
        measured = palette.row(subnet) if palette is not None else None
        if measured is not None:
            row[palette.metric] = round(measured.score, 4)
        subnets.append(row)
    return {
        "kind": "run",
        "folder": str(path),
        "created": run.created,
        "finished": run.finished,
        "steps done": history[-1]["step"] if history else 0,
        "steps in all": sum(stage.steps for stage in fitted.config.stages),
        "base": {
            "name": fitted.config.model,
            "folder": str(model.source),
            "licence": licence_of(fitted.config.model, model.source),
            **_model(model),
        },
        "task": {
            "name": fitted.task.name,
            "problem": fitted.task.problem,
            "metric": fitted.task.metric,
            "labels": list(fitted.task.labels),
        },
        "reordered": fitted.order is not None,
        "adapters": stages,
        "subnets": subnets,
        "run config": run.config,
    }


def _describe_export(path: Path) -> dict:
    origin = Origin.read(path)
    model, _ = load_checkpoint(path)
    described = {
        "kind": "export",
        "folder": str(path),
        "subnet": {"name": origin.name, **dataclasses.asdict(origin.subnet)},
        "run": origin.run,
        "base": origin.config["model"],
        "task": origin.config["task"],
        "licence of the base": licence_of(origin.config["model"], None),
        **_model(model),
    }
    if (path / REPORT).is_file():
        try:
            report = json.loads((path / REPORT).read_text(encoding="utf-8"))
            described["shape repairs"] = {k: report[k] for k in ("padded", "why", "params_before", "params_after")}
        except (ValueError, KeyError, TypeError) as e:
            raise RunError(f"{path / REPORT} is damaged ({e!r}): export again.") from e
    return described


def lines(described: Mapping, indent: str = "") -> Iterator[str]:
    """The same as text: one entry a line, lists of records as tables."""
    width = max((len(str(key)) for key, value in described.items() if not isinstance(value, Mapping)), default=0)
    for key, value in described.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}"
            yield from (f"{indent}  {row}" for row in _rows(value))
        else:
            yield f"{indent}{key!s:<{width}}  {_text(value)}"


def _rows(records: Sequence[Mapping]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [[_text(record.get(column, "")) for column in columns] for record in records]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
