"""The encoder palette on real data: how much of the maxnet's accuracy do its subnets keep?

For each task and seed: one MLFS run on all the data, the test accuracy of its named subnets, and the honest baseline,
LoRA fine-tuning of a naively truncated model: the same size as ``quarter``, made of the first heads and neurons of the
pretrained model, no importance, no teacher; as many adapter parameters and as many steps.

    python experiments/mlfs_encoder_palette.py                        # 3 seeds x 2 tasks; hours on 2 cores
    python experiments/mlfs_encoder_palette.py --preset h200          # longer, for a GPU
    python experiments/mlfs_encoder_palette.py --preset paper         # BERT-base on GLUE: for a hub and a TPU
    python experiments/mlfs_encoder_palette.py --report               # table and plot of what is there already

Every seed's result is written as it comes (experiments/results/mlfs_encoder_palette.json); what is stopped goes on
where it was. Choices are made on the validation split; the numbers are of the test split (GLUE has none: as in the
paper, its are of the validation split; tensorflow-datasets' folder is $TFDS_DATA_DIR).
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from alone import train_alone
from rich.console import Console
from rich.table import Table
from store import check_names, final_score, load_results, mean_and_spread, run_key, save_result

import mlfs_jax as mlfs
from mlfs_jax.data.glue import GLUE
from mlfs_jax.evaluate import evaluate
from mlfs_jax.subnet import num_params

RESULTS = Path(__file__).parent / "results" / "mlfs_encoder_palette.json"
MODELS = {"cpu": "minilm-l6", "h200": "minilm-l6", "paper": "google-bert/bert-base-uncased"}

# Small batches: at equal cost more steps. Stage 1, where the narrow subnets learn, is the long one.
LONG = {"rank": (8, 32, 8), "random_subnets": (0, 0, 1), "learning_rate": (7e-4, 7e-4, 2e-4)}
PRESETS = {
    # buckets: few, because each is one more compile of every step
    "cpu": {
        "wiki-topic": {"steps": (200, 1300, 200), "batch_size": 16, "max_length": 48, "buckets": (48,), **LONG},
        "movie": {"steps": (600, 900, 200), "batch_size": 16, "max_length": 64, "buckets": (32, 64), **LONG},
    },
    "h200": {task: {"steps": (450, 1800, 600), "batch_size": 32, **LONG} for task in ("wiki-topic", "movie")},
    # [paper] rank 8, alpha 0.9, beta 0.1; its steps and rates are not published
    "paper": {task: {"steps": (1000, 3000, 3000), "learning_rate": 5e-4, "max_length": 128} for task in GLUE},
}
ALONE = "baseline: cut to a quarter, LoRA"


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        tasks: the preset's when empty.
        model: another than the preset's: a name, a hub id, or a Hugging Face folder.
    """

    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: Literal["cpu", "h200", "paper"] = "cpu"
    model: str | None = None
    runs: Path = Path("runs/encoder_palette")
    report: bool = False  # only print and plot what has been measured


def config_for(options: Options, task: str, seed: int) -> mlfs.FitConfig:
    model = options.model or MODELS[options.preset]
    return mlfs.FitConfig(model=model, task=task, seed=seed, **PRESETS[options.preset][task])


def palette(fitted: mlfs.Fitted, data: dict) -> dict[str, dict]:
    """Scores and sizes of the named subnets."""
    rows, config, merged = {}, fitted.model.config, fitted.merged
    for name, subnet in fitted.space.names().items():
        small = mlfs.slice_subnet(merged, subnet)
        score = {split: evaluate(small, data[split], fitted.task.metric) for split in data if split != "train"}
        rows[name] = {"subnet": str(subnet), "share": num_params(config, subnet) / num_params(config), **score}
    return rows


def report(options: Options, console: Console) -> None:
    """Mean and spread over seeds, as a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    preset, model = options.preset, options.model or MODELS[options.preset]
    results = [r for r in load_results(RESULTS).values() if (r["preset"], r["config"]["model"]) == (preset, model)]
    tasks = [task for task in PRESETS[preset] if any(r["task"] == task for r in results)]
    if not tasks:
        console.print(f"nothing measured yet with preset {preset}.")
        return
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        runs = [r for r in results if r["task"] == task]
        table = Table(title=f"{task}: mean and standard deviation of {len(runs)} seeds ({preset})")
        for column in ("subnet", "share of parameters", "score", "of the maxnet's"):
            table.add_column(column, justify="left" if column == "subnet" else "right")
        scores = {name: [final_score(r["palette"][name]) for r in runs] for name in runs[0]["palette"]}
        shares = {name: row["share"] for name, row in runs[0]["palette"].items()}
        scores[ALONE], shares[ALONE] = (
            [final_score(r["baseline"]) for r in runs],
            shares.get("quarter", shares["minnet"]),
        )
        for name, values in scores.items():
            kept = [score / whole if whole else np.nan for score, whole in zip(values, scores["maxnet"], strict=True)]
            shown = (mean_and_spread(x, "{:.4f}".format) for x in (values, kept))
            table.add_row(name, f"{shares[name]:.3f}", *shown)
        console.print(table)
        layers = {name: re.findall(r"layers=(\d+)", row["subnet"])[0] for name, row in runs[0]["palette"].items()}
        series = {
            f"palette, {n} layers": ([name for name in layers if layers[name] == n], "o-") for n in layers.values()
        }
        for label, (names, marker) in (series | {ALONE: ([ALONE], "s")}).items():
            means = [np.mean(scores[name]) for name in names]
            spreads = [np.std(scores[name], ddof=len(runs) > 1) for name in names]
            panel.errorbar([shares[name] for name in names], means, spreads, fmt=marker, capsize=3, label=label)
        panel.set(title=task, xlabel="share of the maxnet's non-embedding parameters", ylabel="score")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    console.print(f"wrote {RESULTS.with_suffix('.png')}")


def main(options: Options) -> None:
    console = Console()
    check_names("task", options.tasks, PRESETS[options.preset])
    other = options.model if options.model != MODELS[options.preset] else None
    for seed in options.seeds if not options.report else ():
        for task in options.tasks or PRESETS[options.preset]:
            key = run_key(f"{options.preset}/{task}/{seed}", other)
            config = config_for(options, task, seed)
            done = load_results(RESULTS).get(key)
            if done and done["config"] == json.loads(json.dumps(dataclasses.asdict(config))):
                continue
            console.print(f"[bold]{key}")
            start = time.time()
            fitted = mlfs.fit(config, options.runs / key, console=console)
            if fitted is None:
                return
            data = config.load_data(fitted.task, fitted.model)
            result = {"preset": options.preset, "task": task, "seed": seed, "device": jax.devices()[0].device_kind}
            result["config"] = json.loads(json.dumps(dataclasses.asdict(config)))
            steps = sum(stage.steps for stage in config.stages)
            alone = train_alone(fitted, data, fitted.space.named("quarter"), steps)
            result |= {"palette": palette(fitted, data), "baseline": alone}
            save_result(RESULTS, key, result | {"seconds": round(time.time() - start)})
    report(options, console)


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
