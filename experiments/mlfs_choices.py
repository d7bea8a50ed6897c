"""What the choices of MLFS are worth on an encoder: stages, gradient scaling, the order of importance; and
against small models, each trained alone.

    python experiments/mlfs_choices.py             # bert-tiny on wiki-topic, 3 seeds; about an hour on one core
    python experiments/mlfs_choices.py --report    # table and plot of what is there already

The arms take the same steps over the same batches; each differs from "three stages" in what its name says. Steps are
not compute: one stage trains more networks in each step than the first two of three do. So "one stage, equal passes"
stops when it has taken as many passes through a network (a subnet's counts like the maxnet's) as three stages take.
"alone" is the baseline at that total budget: the palette's sizes, each cut naively from the pretrained model and
trained by itself, sharing the palette's passes; in "alone, best k" each is cut by importance, as the palette's are, and
the passes of stage 0, after which that is measured, are paid for. Numbers are of the test split.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from alone import train_alone
from rich.console import Console
from rich.table import Table
from store import check_names, load_results, mean_and_spread, save_result

import mlfs_jax as mlfs
from mlfs_jax.evaluate import evaluate
from mlfs_jax.timing import device_name

RESULTS = Path(__file__).parent / "results" / "mlfs_choices.json"
STEPS, RATES = (400, 400, 400), (2e-3, 2e-3, 5e-4)
ARMS = {
    "three stages": {},
    "three stages, one rate": {"learning_rate": max(RATES)},
    "one stage": {"steps": (1, 1, sum(STEPS) - 2), "learning_rate": max(RATES)},
    "one stage, equal passes": {"steps": (2, 1, 719), "learning_rate": max(RATES)},
    "first k": {"reorder": False},
    "gamma 1": {"gamma": 1.0},
    "gamma 2": {"gamma": 2.0},
}
ALONE = ("alone", "alone, best k")


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = (*ARMS, *ALONE)
    model: str = "bert-tiny"
    task: str = "wiki-topic"
    runs: Path = Path("runs/choices")
    report: bool = False  # only print and plot what has been measured


def config_for(options: Options, arm: str, seed: int) -> mlfs.FitConfig:
    settings = {"steps": STEPS, "learning_rate": RATES, "rank": 16, "max_length": 48, "buckets": (48,)}
    return mlfs.FitConfig(options.model, options.task, seed=seed, **settings | ARMS.get(arm, {}))


def passes(config: mlfs.FitConfig, space: mlfs.SubnetSpace) -> int:
    """Networks that a run trains, counted once for each step."""
    return sum(stage.steps * (1 + len(stage.subnets(space, jax.random.key(0)))) for stage in config.stages)


def measure(options: Options, arm: str, seed: int, console: Console) -> dict | None:
    """Scores of every named subnet, and the passes of training; None when the run was stopped."""
    config = config_for(options, arm, seed)
    name = "three stages" if arm in ALONE else arm
    fitted = mlfs.fit(config, options.runs / name.replace(" ", "-") / str(seed), console=console)
    if fitted is None:
        return None
    data, names = config.load_data(fitted.task, fitted.model), fitted.space.names()
    if arm in ALONE:
        best = arm != "alone"
        paid = config.stages[0].steps if best else 0
        steps = (passes(config, fitted.space) - paid) // len(names)
        console.print(f"each of {len(names)} alone for {steps} steps")
        scores = {name: train_alone(fitted, data, subnet, steps, best=best)["test"] for name, subnet in names.items()}
        return {"scores": scores, "passes": steps * len(names) + paid}
    cut = {name: mlfs.slice_subnet(fitted.merged, subnet) for name, subnet in names.items()}
    scores = {name: evaluate(small, data["test"], fitted.task.metric) for name, small in cut.items()}
    return {"scores": scores, "passes": passes(config, fitted.space)}


def report(options: Options, console: Console) -> None:
    """Mean and spread over seeds: accuracy of each named subnet, for every arm; a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [r for r in load_results(RESULTS).values() if (r["model"], r["task"]) == (options.model, options.task)]
    arms = {arm: [r["scores"] for r in results if r["arm"] == arm] for arm in (*ARMS, *ALONE)}
    spent = {r["arm"]: r["passes"] for r in results}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if not arms:
        console.print(f"nothing measured yet of {options.model} on {options.task}.")
        return
    names = list(next(iter(arms.values()))[0])
    table = Table(title=f"{options.model}, {options.task}: test accuracy in percent, and loss of the smallest")
    for column in ("arm", "passes", *names, "loss of minnet"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, runs in arms.items():
        scores = {name: [100 * run[name]["accuracy"] for run in runs] for name in names}
        loss = mean_and_spread([run["minnet"]["loss"] for run in runs], "{:.3f}".format)
        table.add_row(arm, f"{spent[arm]:,}", *map(mean_and_spread, scores.values()), loss)
        panel.plot(names, [sum(s) / len(s) for s in scores.values()], marker="o", label=arm)
    console.print(table)
    panel.set(ylabel="test accuracy, percent", title=f"{options.model}, {options.task}")
    panel.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    console.print(f"wrote {RESULTS.with_suffix('.png')}")


def main(options: Options) -> None:
    console = Console()
    check_names("arm", options.arms, (*ARMS, *ALONE))
    for seed in options.seeds if not options.report else ():
        for arm in options.arms:
            key = f"{options.model}/{options.task}/{arm}/{seed}"
            config = json.loads(json.dumps(dataclasses.asdict(config_for(options, arm, seed))))
            if load_results(RESULTS).get(key, {}).get("config") == config:
                continue
            console.print(f"[bold]{key}")
            begin = time.process_time()
            if (found := measure(options, arm, seed, console)) is None:
                return
            result = {"model": options.model, "task": options.task, "arm": arm, "seed": seed, "config": config}
            spent = {"device": device_name(), "cpu_seconds": round(time.process_time() - begin)}
            save_result(RESULTS, key, result | found | spent)
    report(options, console)


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
