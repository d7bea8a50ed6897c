"""An adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlfs_jax.backbone.tree import STACKED, flatten, misfit
from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.hf.configs import to_hf
from mlfs_jax.hf.families import FAMILIES
from mlfs_jax.hf.table import to_theirs
from mlfs_jax.model import Model
from mlfs_jax.registry import ADAPTER
from mlfs_jax.run import write_atomic, write_json

MADE = {"made_by": "mlfs_jax"}
CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"

TASKS = {"none": "FEATURE_EXTRACTION", "sequence": "SEQ_CLS", "token": "TOKEN_CLS", "mlm": None, "lm": "CAUSAL_LM"}


@dataclass(frozen=True)
class PeftReport:
    """What was written.

    Attributes:
        directory, files: where.
        rank: R, the same at every site (shorter pairs are padded with zeros).
        target_modules: modules with a low-rank pair.
        modules_to_save: modules written whole (base + delta).
        params: numbers in the adapter, the whole modules included.
    """

    directory: Path
    files: tuple[str, ...]
    rank: int
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    params: int


def export_peft(
    model: Model, lora: Mapping[str, Mapping[str, Array]], directory: str | Path, *, base_model_name: str
) -> PeftReport:
    """Write the adapter of a whole (not sliced) model so that ``peft`` loads it onto transformers' model.

        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=C), directory)

    The head of a classifier is always written, trained or not: the base checkpoint has none, or another one.

    Args:
        lora: low-rank pairs and full deltas by site; several stages: ``stack_stages`` first.
        base_model_name: what transformers loads the base from: a hub id or a path.

    Raises:
        ConfigError: the adapter is of another model, or has no low-rank pair; Hugging Face cannot express the model's
            shape, or PEFT the adapter (a pair and a delta at one site, a parameter outside any module, a projection
            that is joined with others or stored [in, out]).
        RunError: the folder holds something else than an adapter, or it cannot be written.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file: choose a folder for the adapter.")
    if directory.exists() and any(directory.iterdir()) and not _is_ours(directory / WEIGHTS):
        raise RunError(
            f"{directory} holds something that is not an adapter of mlfs_jax: choose another folder, or empty this one."
        )
    config, family = model.config, FAMILIES[model.config.family]
    to_hf(config)  # a sliced shape has no base that PEFT could load
    if (wrong := misfit(model.base, lora)) is not None:
        raise ConfigError(f"adapter of another model: {wrong}.")
    params = flatten(model.base)
    pairs = {site: entry for site, entry in lora.items() if "a" in entry}
    if not pairs:
        raise ConfigError("the adapter has no low-rank pair: PEFT opens none without.")
    whole = {site for site, entry in lora.items() if entry.keys() - {"a", "b"}}
    if config.head in ("sequence", "token"):
        whole |= set(family.heads[config.head])
    for site in sorted(whole):
        if site in pairs:
            raise ConfigError(f"{site} is both low-rank and written whole: PEFT can do one of the two per module.")
        if site in ("head", "embed.tokens") and (config.head == "mlm" or getattr(config, "tied", False)):
            raise ConfigError(f"{site} is tied or in no module of its own: PEFT cannot write it whole.")
    shared = Counter(family.module(site, config.head) for site in {name.rpartition(".")[0] for name in params})
    for site in sorted({*whole, *pairs}):
        module = family.module(site, config.head)
        if shared[module] > 1 or "{head}" in module:
            raise ConfigError(
                f"{site} has no module of its own in {config.family}, whose {module} holds several: PEFT cannot hold "
                "its adapter. Export a subnet: its weights have the adapter merged in."
            )
        if family.in_out and site in pairs:
            raise ConfigError(
                f"{config.family} stores {site} as [in, out], for which no PEFT adapter is written here. Export a "
                "subnet: its weights have the adapter merged in."
            )

    tensors: dict[str, np.ndarray] = {}
    rank = max(entry["a"].shape[-1] for entry in pairs.values())
    for site, entry in pairs.items():
        kernel, stacked = params[f"{site}.kernel"], site.startswith(STACKED + ".")
        depth = kernel.shape[0] if stacked else 1
        a = np.asarray(entry["a"]).reshape(depth, -1, entry["a"].shape[-1])
        b = np.asarray(entry["b"]).reshape(depth, a.shape[-1], -1)
        extra = rank - a.shape[-1]
        a, b = np.pad(a, ((0, 0), (0, 0), (0, extra))), np.pad(b, ((0, 0), (0, extra), (0, 0)))
        for i in range(depth):
            module = family.module(site, config.head).format(layer=i)
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a[i].T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b[i].T)

    for name, param in params.items():
        site, _, leaf = name.rpartition(".")
        if site not in whole:
            continue
        value = np.asarray(param[...]) + np.asarray(lora.get(site, {}).get(leaf, 0), dtype=param.dtype)
        keys = family.keys(name, param.axes, param.shape, config.head)
        for key, tensor in zip(keys, to_theirs(name, param.axes, value), strict=True):
            tensors[f"base_model.model.{key}"] = tensor

    saved = sorted({m for site in whole for m in _modules(model, site)})
    targets = [family.module(site, config.head) for site in pairs]
    patterns = "|".join(re.escape(m).replace(r"\{layer\}", r"\d+") for m in targets)
    adapter = {
        "peft_type": "LORA",
        "task_type": TASKS[config.head],
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": rank,  # scale = lora_alpha / r = 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": f"({patterns})",
        "modules_to_save": saved or None,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {directory}: {error.strerror}.") from error
    write_atomic(directory / WEIGHTS, save(tensors, metadata={"format": "pt"} | MADE))
    write_json(directory / CONFIG, adapter)
    params_written = sum(tensor.size for tensor in tensors.values())
    return PeftReport(directory, (CONFIG, WEIGHTS), rank, tuple(targets), tuple(saved), params_written)


def _is_ours(file: Path) -> bool:
    """Whether an earlier export wrote this adapter: one of somebody else is not written over."""
    try:
        with safe_open(file, "numpy") as opened:
            return MADE.items() <= (opened.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def _modules(model: Model, site: str) -> list[str]:
    """The modules that PEFT keeps whole for a site.

    PEFT itself adds ``classifier`` for classification tasks, and modules to save must not nest: what is below it
    counts as it.
    """
    family, head = FAMILIES[model.config.family], model.config.head
    module = family.module(site, head)
    if module.startswith("classifier."):
        return ["classifier"]
    return [module.format(layer=i) for i in range(model.config.layers)] if "{layer}" in module else [module]
