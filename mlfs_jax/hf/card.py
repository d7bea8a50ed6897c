"""The model card (README.md) of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.model import Model

if TYPE_CHECKING:
    from mlfs_jax.hf.export import ExportReport

AUTO = {
    "none": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "mlm": "AutoModelForMaskedLM",
    "lm": "AutoModelForCausalLM",
}
PIPELINES = {
    "none": "feature-extraction",
    "sequence": "text-classification",
    "token": "token-classification",
    "mlm": "fill-mask",
    "lm": "text-generation",
}


def model_card(model: Model, exported: Config, report: ExportReport, extra: str | None) -> str:
    """Markdown: how to load it, what it is, what the export changed, and ``extra`` (evaluation numbers)."""
    config, auto, place = model.config, AUTO[model.config.head], report.directory.name
    tokenizer = any(file.startswith(("tokenizer", "vocab")) or file.endswith(".model") for file in report.files)
    load = [f"from transformers import {auto}" + (", AutoTokenizer" if tokenizer else ""), ""]
    load.append(f'model = {auto}.from_pretrained("{place}")')
    if tokenizer:
        load.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}")')

    rows = [
        (what, getattr(config, field), getattr(exported, field), report.sliced.get(field, (None,))[0])
        for what, field in (
            ("layers", "layers"),
            ("channels (hidden size)", "embed"),
            ("heads", "heads"),
            ("head size", "head_dim"),
            ("mlp neurons", "mlp"),
        )
    ]
    table = ["| | model | these files | sliced from |", "|---|---|---|---|"]
    table += [f"| {what} | {ours} | {theirs} | {before or ours} |" for what, ours, theirs, before in rows]
    table.append(f"| parameters | {report.params_before:,} | {report.params_after:,} | |")

    kind = "decoder" if isinstance(config, DecoderConfig) else "encoder"
    why = " ".join(report.why) or "The shape is expressed as it is."
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {PIPELINES[config.head]}",
        "tags: [mlfs, pruned, knowledge-distillation]",
        "---",
        "",
        f"# {place}",
        "",
        f"A {config.family} {kind} with {report.params_before:,} parameters, written by mlfs_jax from `{model.name}`.",
        "",
        "```python",
        *load,
        "```",
        "",
        *table,
        "",
        f"{why} The function is the model's own, to rounding.",
    ]
    if report.copies > 1 and config.head == "none":
        lines += ["", f"Hidden states hold the model's {config.embed} channels {report.copies} times: use the first."]
    if extra:
        lines += ["", extra.strip()]
    return "\n".join(lines) + "\n"
