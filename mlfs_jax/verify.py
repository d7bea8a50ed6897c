"""Masked == sliced == exported: whether an exported folder computes what its run learnt.

A subnet has three lives, and this compares their logits, on random token ids and on texts of the task's validation
split. It also holds the folder's files and the run against the hashes taken at export, and asks whether the
low-rank pairs do anything at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from mlfs_jax.config import Config, EncoderConfig
from mlfs_jax.data.batches import pad
from mlfs_jax.data.encode import encode_for
from mlfs_jax.errors import SubnetError
from mlfs_jax.export import Origin, fingerprint, public_config
from mlfs_jax.hf.configs import label_names
from mlfs_jax.hf.load import load_checkpoint, read_config
from mlfs_jax.model import Model, forward
from mlfs_jax.registry import sha256_of
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import make_mask
from mlfs_jax.train import Fitted

TOLERANCE = 1e-4
"""Largest difference of two logits in float32 that rounding explains."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        inputs: on what: "random", "real", or "".
        difference: largest absolute difference of logits, where logits were compared.
        ok: None when it was skipped.
        note: what is wrong, or why it was skipped.
    """

    name: str
    inputs: str
    difference: float | None
    ok: bool | None
    note: str = ""


def all_ok(checks: list[Check]) -> bool:
    return all(check.ok is not False for check in checks)


def table(checks: list[Check]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("check", "inputs", "max |difference|", "", ""):
        table.add_column(column, justify="right" if "|" in column else "left")
    said = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "skipped"}
    for check in checks:
        difference = "" if check.difference is None else f"{check.difference:.1e}"
        table.add_row(check.name, check.inputs, difference, said[check.ok], check.note)
    return table


def verify(directory: str | Path, fitted: Fitted, *, examples: int = 16, seed: int = 0) -> list[Check]:
    """Compare an exported folder with the run it came from.

    Args:
        examples: rows of the random and of the real batch.

    Raises:
        RunError: the folder is none that ``mlfs export`` wrote, or the data have changed since the run.
        SubnetError: the run's model does not hold such a subnet: it is another run.
        CheckpointError: the folder cannot be loaded at all.
    """
    directory = Path(directory).expanduser()
    origin = Origin.read(directory)
    try:
        subnet = fitted.space.check(origin.subnet)
    except SubnetError as e:
        raise SubnetError(f"{directory} holds the subnet {origin.subnet}, which is none of this run: {e}") from e

    exported, _ = load_checkpoint(directory)
    sliced = slice_subnet(fitted.model, subnet, lora=fitted.lora)
    mask = make_mask(fitted.model.config, subnet)
    heads_only = {
        site: {leaf: 0 * value if leaf in ("a", "b") else value for leaf, value in entry.items()}
        for site, entry in fitted.lora.items()
    }
    lives = {
        "masked": lambda batch: _logits(fitted.model, batch, lora=fitted.lora, mask=mask),
        "sliced": lambda batch: _logits(sliced, batch),
        "exported": lambda batch: _logits(exported, batch),
    }
    if importlib.util.find_spec("torch") is not None:
        lives["transformers"] = _transformers(directory, fitted.task.is_language)

    real, same_tokens = _real_batch(directory, fitted, examples)
    width = real["input_ids"].shape[1]
    batches = {"random": random_batch(fitted.model.config, examples, width, seed), "real": real}
    checks = [*_provenance(directory, origin, fitted), same_tokens]
    for inputs, batch in batches.items():
        logits = {life: run(batch) for life, run in lives.items()}
        for life in list(lives)[1:]:
            checks.append(_compare(f"{life} == masked", inputs, logits[life], logits["masked"]))
        without = _logits(fitted.model, batch, lora=heads_only, mask=mask)
        checks.append(_active(inputs, logits["exported"], without))
    if "transformers" not in lives:
        checks.append(Check("transformers == masked", "", None, None, "torch is not installed"))
    return checks


def _provenance(directory: Path, origin: Origin, fitted: Fitted) -> list[Check]:
    changed = [
        name
        for name, sha256 in origin.files.items()
        if not (directory / name).is_file() or sha256_of(directory / name) != sha256
    ]
    now, then = public_config(fitted), origin.config
    other = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    other += [what for what, sha256 in fingerprint(fitted).items() if origin.fingerprint.get(what) != sha256]
    labels = label_names(read_config(directory))
    named = not fitted.task.labels or labels == fitted.task.labels
    return [
        Check("files as they were written", "", None, not changed, f"changed: {', '.join(changed)}" if changed else ""),
        Check("run as it was exported", "", None, not other, f"other: {', '.join(other)}" if other else ""),
        Check("label names are the task's", "", None, named, "" if named else f"{labels}"),
    ]


def _real_batch(directory: Path, fitted: Fitted, examples: int) -> tuple[dict[str, np.ndarray], Check]:
    """Validation texts, tokenized as the run does; and whether the export's own tokenizer says the same."""
    fitted.load_data()  # raises where they have changed
    texts = fitted.task.read()["validation"]
    texts = texts.take(range(min(examples, len(texts))))
    length = fitted.config.max_length or fitted.task.max_length
    base, own = (encode_for(fitted.task, texts, folder, length) for folder in (fitted.model.source, directory))
    same = np.array_equal(base.ids, own.ids) and np.array_equal(base.offsets, own.offsets)
    note = "" if same else "the exported tokenizer gives other ids"
    batch = pad(base, range(len(base)), int(base.lengths.max()))
    return batch, Check("tokenizer is the base's", "real", None, same, note)


def random_batch(config: Config, rows: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Random token ids [rows, width], every other row padded from a random place on."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(config.vocab_size - 1, size=(rows, width))
    ids += ids >= config.pad_token_id  # RoBERTa counts positions over all ids but the padding's
    lengths = np.where(np.arange(rows) % 2, rng.integers(1, width + 1, rows), width)
    real = np.arange(width) < lengths[:, None]
    batch = {"input_ids": np.where(real, ids, config.pad_token_id), "attention_mask": real}
    if isinstance(config, EncoderConfig) and config.type_vocab > 1:
        batch["token_type_ids"] = np.where(real, rng.integers(config.type_vocab, size=ids.shape), 0)
    return {name: value.astype(np.int32) for name, value in batch.items()}


def _logits(model: Model, batch: Mapping, **kw) -> np.ndarray:
    with jax.default_matmul_precision("highest"):  # a GPU's or TPU's own default is coarser than the tolerance
        return _real(np.asarray(forward(model.graphdef, model.base, batch, **kw).logits), batch)


def _real(logits: np.ndarray, batch: Mapping) -> np.ndarray:
    """Logits [B, C] as they are; of [B, T, V], those of real tokens: what stands at padding is nobody's business."""
    return logits if logits.ndim == 2 else logits[np.asarray(batch["attention_mask"], bool)]


def _transformers(directory: Path, language: bool):
    """The folder as anybody else would open it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()

    def run(batch: Mapping) -> np.ndarray:
        inputs = {n: torch.tensor(x, dtype=torch.long) for n, x in batch.items() if n not in ("labels", "loss_mask")}
        with torch.no_grad():
            return _real(model(**inputs).logits.numpy(), batch)

    return run


def _compare(name: str, inputs: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
    difference = float(np.abs(ours - theirs).max())
    ok = difference <= TOLERANCE  # false for NaN, too
    return Check(name, inputs, difference, ok, "" if ok else f"expected at most {TOLERANCE:.0e}")


def _active(inputs: str, logits: np.ndarray, without: np.ndarray) -> Check:
    difference = float(np.abs(logits - without).max())
    ok = difference > TOLERANCE
    note = "" if ok else "logits are the same without the low-rank pairs"
    return Check("adapter is active", inputs, difference, ok, note)
