"""The encoder palette on real data: how much of the maxnet's accuracy do its subnets keep?

For each task and seed: one MLFS run on all the data, the test accuracy of its named subnets, and the honest baseline,
LoRA fine-tuning of a naively truncated model: the same size as ``quarter``, made of the first heads and neurons of the
pretrained model, no importance, no teacher; as many adapter parameters and as many steps.

    python experiments/mlfs_encoder_palette.py                        # 3 seeds x 2 tasks; hours on 2 cores
    python experiments/mlfs_encoder_palette.py --preset h200          # longer, for a GPU
    python experiments/mlfs_encoder_palette.py --report               # table and plot of what is there already

Every seed's result is written as it comes (experiments/results/mlfs_encoder_palette.json); what is stopped goes on
where it was. Choices are made on the validation split; the numbers are of the test split.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from alone import train_alone
from rich.console import Console
from rich.table import Table
from store import load_results, save_result

import mlfs_jax as mlfs
from mlfs_jax.evaluate import evaluate
from mlfs_jax.subnet import num_params

RESULTS = Path(__file__).parent / "results" / "mlfs_encoder_palette.json"
TASKS = ("wiki-topic", "movie")

# Small batches: at equal cost more steps. Stage 1, where the narrow subnets learn, is the long one.
LONG = {"rank": (8, 32, 8), "random_subnets": (0, 0, 1), "learning_rate": (7e-4, 7e-4, 2e-4)}
PRESETS = {
    # buckets: few, because each is one more compile of every step
    "cpu": {
        "wiki-topic": {"steps": (200, 900, 200), "batch_size": 16, "max_length": 48, "buckets": (48,), **LONG},
        "movie": {"steps": (600, 900, 200), "batch_size": 16, "max_length": 64, "buckets": (32, 64), **LONG},
    },
    "h200": {task: {"steps": (450, 1800, 600), "batch_size": 32, **LONG} for task in TASKS},
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str = "cpu"
    runs: Path = Path("runs/encoder_palette")
    report: bool = False  # only print and plot what has been measured


def config_for(task: str, seed: int, preset: str) -> mlfs.FitConfig:
    return mlfs.FitConfig(model="minilm-l6", task=task, seed=seed, **PRESETS[preset][task])


def palette(fitted: mlfs.Fitted, data: dict) -> dict[str, dict]:
    """Accuracy and size of the named subnets."""
    rows, config, merged = {}, fitted.model.config, fitted.merged
    for name, subnet in fitted.space.names().items():
        small = mlfs.slice_subnet(merged, subnet)
        score = {split: evaluate(small, data[split], fitted.task.metric) for split in ("validation", "test")}
        rows[name] = {"subnet": str(subnet), "share": num_params(config, subnet) / num_params(config), **score}
    return rows


def report(preset: str, console: Console) -> None:
    """Mean and spread over seeds, as a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {key: r for key, r in load_results(RESULTS).items() if r["preset"] == preset}
    tasks = [task for task in TASKS if any(r["task"] == task for r in results.values())]
    if not tasks:
        console.print(f"nothing measured yet with preset {preset}.")
        return
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        runs = [r for r in results.values() if r["task"] == task]
        table = Table(title=f"{task}: test accuracy, mean and standard deviation of {len(runs)} seeds ({preset})")
        for column in ("subnet", "share of parameters", "accuracy", "of the maxnet's"):
            table.add_column(column, justify="left" if column == "subnet" else "right")
        maxnet = np.array([r["palette"]["maxnet"]["test"]["accuracy"] for r in runs])
        shares, means, spreads = [], [], []
        for name, row in runs[0]["palette"].items():
            accuracy = np.array([r["palette"][name]["test"]["accuracy"] for r in runs])
            kept = accuracy / maxnet
            score, of_maxnet = (f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in (accuracy, kept))
            table.add_row(f"{name} ({row['subnet']})", f"{row['share']:.3f}", score, of_maxnet)
            shares, means = [*shares, row["share"]], [*means, accuracy.mean()]
            spreads = [*spreads, accuracy.std(ddof=1)]
        baseline = np.array([r["baseline"]["test"]["accuracy"] for r in runs])
        quarter = runs[0]["palette"]["quarter"]["share"]
        score, of_maxnet = (f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in (baseline, baseline / maxnet))
        table.add_row("baseline: truncated quarter, LoRA", f"{quarter:.3f}", score, of_maxnet)
        console.print(table)
        panel.errorbar(shares, means, spreads, marker="o", capsize=3, label="MLFS palette")
        spread = baseline.std(ddof=1)
        panel.errorbar([quarter], baseline.mean(), spread, marker="s", capsize=3, label="truncated + LoRA")
        panel.set(title=task, xlabel="share of the maxnet's non-embedding parameters", ylabel="test accuracy")
        panel.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    console.print(f"wrote {RESULTS.with_suffix('.png')}")


def main(options: Options) -> None:
    console = Console()
    for seed in options.seeds if not options.report else ():
        for task in options.tasks:
            key = f"{options.preset}/{task}/{seed}"
            config = config_for(task, seed, options.preset)
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
    report(options.preset, console)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
