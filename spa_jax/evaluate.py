"""What a plugin or a baseline writes, held against the references: Rouge, usage, diff and pick rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlfs_jax.data.batches import prompt_batches
from mlfs_jax.data.encode import Encoded, load_tokenizer
from mlfs_jax.data.tokenizer import prefix_of
from mlfs_jax.errors import ConfigError, unknown
from mlfs_jax.generate import GenerateConfig
from mlfs_jax.generate import generate as generate_base
from mlfs_jax.generate.session import as_rows
from mlfs_jax.metrics import rouge
from mlfs_jax.model import Model
from mlfs_jax.run import Run
from spa_jax.baselines import Baseline, load_baseline
from spa_jax.config import BASELINE, FIT
from spa_jax.decode import generate, rates
from spa_jax.plugin import Plugin
from spa_jax.seam import Setting
from spa_jax.train import Fitted, load_run

SPLIT = "test"


def evaluate_plugin(
    model: Model,
    plugin: Plugin,
    encoded: Encoded,
    *,
    setting: str | None = None,
    threshold: float | None = None,
    beams: int = 1,
    batch_size: int = 16,
    advance: Callable[[str], None] = lambda doing: None,
) -> dict[str, float]:
    """Every prompt of a split, completed.

    Args:
        setting: another one than the plugin's own, of those its side network was trained for: "s1" for "spa" and
            "s3" for "s2", or the reverse where there is a gate.
        threshold: another one than the plugin's own.
        beams: of a beam search; 1: greedy.

    Returns ``rouge1``, ``rouge2``, ``rougeL``; over the tokens written ``usage``, ``diff`` and ``pick`` (see
    :func:`rates`) and how many ``tokens``.
    """
    setting = plugin.setting if setting is None else Setting.parse(setting)
    if setting.adds != plugin.setting.adds or (setting.gated and not plugin.side.gate):
        raise ConfigError(
            f"setting {setting} of a plugin for {plugin.setting}: its side network "
            + ("has no gate." if setting.adds == plugin.setting.adds else "was trained for another role.")
        )
    threshold = plugin.threshold if threshold is None else threshold
    sigma, differs = [], []

    def write(rows: list[list[int]], config: GenerateConfig, real: int) -> list[list[int]]:
        found = generate(model, plugin.side, rows, config, setting=setting, threshold=threshold)
        sigma.extend(found.sigma[:real])
        differs.extend(found.differs[:real])
        return found.tokens

    scores = _complete(write, model, encoded, beams, batch_size, advance)
    return scores | rates(np.concatenate(sigma), np.concatenate(differs))


def _complete(
    write: Callable, model: Model, encoded: Encoded, beams: int, batch_size: int, advance, *, one_line: bool = False
) -> dict:
    """Rouge of what ``write(prompts, config, how many of them are no filling)`` writes, and how many tokens it is."""
    texts, references, count = [], [], 0
    tokenizer = load_tokenizer(model.source)
    config = GenerateConfig(max_new_tokens=encoded.max_completion, beams=beams)
    batches = prompt_batches(encoded, batch_size)
    for i, (batch, wanted) in enumerate(batches):
        advance(f"batch {i + 1} of {len(batches)}")
        found = write(as_rows(batch), config, len(wanted))[: len(wanted)]
        written = [tokenizer.decode(tokens).strip() for tokens in found]
        texts += [text.split("\n")[0].strip() for text in written] if one_line else written
        references += wanted
        count += sum(map(len, found))
    return {**rouge(texts, references), "tokens": count}


def evaluate_baseline(
    baseline: Baseline,
    encoded: Encoded,
    *,
    beams: int = 1,
    batch_size: int = 16,
    advance: Callable[[str], None] = lambda doing: None,
) -> dict[str, float]:
    """The Rouge scores of :func:`evaluate_plugin` for a baseline."""
    begins = len(prefix_of(load_tokenizer(baseline.model.source))) if baseline.prefix else 0  # the prefix has that

    def write(rows: list[list[int]], config: GenerateConfig, real: int) -> list[list[int]]:
        return generate_base(baseline.model, [[*baseline.prefix, *row[begins:]] for row in rows], config).tokens

    return _complete(write, baseline.model, encoded, beams, batch_size, advance, one_line=baseline.one_line)


def evaluate_run(
    path: str | Path,
    *,
    usage: float | None = None,
    setting: str | None = None,
    split: str = SPLIT,
    beams: int = 1,
    limit: int | None = None,
    batch_size: int = 16,
    advance: Callable[[str], None] = lambda doing: None,
) -> dict[str, float]:
    """Evaluate a finished run of ``spa fit`` or ``spa baseline`` on a split of its task.

    Args:
        usage: share of tokens that the side network is wanted for; the threshold comes from the plugin's
            calibration. The usage that is reported is what it came to.
        limit: at most this many examples.

    Raises:
        RunError: no finished run. ConfigError: a usage outside [0, 1], or of a setting without a gate.
        UnknownNameError: the task, or this user of it, has no such split.
    """
    if "method" in Run.open(path, finished=True, kinds=(FIT, BASELINE)).config:
        if usage is not None or setting is not None:
            raise ConfigError("usage and setting are of side networks; this run is a baseline.")
        baseline = load_baseline(path)
        fit_config, model = baseline.config.fit_config, baseline.model
        encoded = _split(fit_config.load_data(fit_config.get_task(), model), split, limit)
        return evaluate_baseline(baseline, encoded, beams=beams, batch_size=batch_size, advance=advance)
    fitted = load_run(path)
    if usage is not None and not Setting.parse(setting or fitted.plugin.setting).gated:
        raise ConfigError(f"usage = {usage}: setting {setting or fitted.plugin.setting} has no gate to set.")
    threshold = None if usage is None else fitted.plugin.threshold_for(usage)
    encoded = load_split(fitted, split, limit)
    return evaluate_plugin(
        fitted.model,
        fitted.plugin,
        encoded,
        setting=setting,
        threshold=threshold,
        beams=beams,
        batch_size=batch_size,
        advance=advance,
    )


def load_split(fitted: Fitted, split: str = SPLIT, limit: int | None = None) -> Encoded:
    """The examples of a run's task that it is evaluated on; raises UnknownNameError for a split that there is not."""
    return _split(fitted.config.load_data(fitted.config.get_task(), fitted.model), split, limit)


def _split(data: dict[str, Encoded], split: str, limit: int | None) -> Encoded:
    if split not in data:
        raise unknown("split", split, data)
    return data[split] if limit is None else data[split].subset(limit)
