"""The tables and the picture of what spa_tables.py has measured so far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from store import load_results, mean_and_spread

TABLES = {
    "Table 1": (("zero-shot", "one-shot", "s3", "spa", "lora", "adapter", "parallel-adapter"), ("rougeL",)),
    "Table 3: settings": (("s1", "s2", "s3", "spa"), ("rouge1", "rouge2", "rougeL", "usage")),
    "Tables 5 and 6: data; the gate at 1/2": (("spa, small", "spa, medium", "spa, no budget"), ("rougeL", "usage")),
    "Another task's plugin as the start": (
        ("spa, small", "spa, small, started", "spa", "spa, started"),
        ("rougeL", "usage"),
    ),
    "Table 3, all data": (
        ("s1, all", "s2, all", "s3, all", "spa, all", "spa, disagreement, all"),
        ("rouge1", "rouge2", "rougeL", "usage"),
    ),
    "Table 7: the two sides": (("spa", "spa, no budget", "s2"), ("diff", "pick", "usage")),
}


def print_gates(task: str, runs: list[dict], console: Console) -> None:
    names = ("usage", "pick", "gated_accuracy", "gated_loss")
    table = Table("", *names, title=f"{task}, gates over one side network, teacher-forced; {len(runs)} seeds")
    for method in runs[0]["gates"] if runs else ():
        of = {name: [run["gates"][method][name] for run in runs] for name in names}
        table.add_row(method, *(mean_and_spread(values, "{:.3f}".format) for values in of.values()))
    if runs:
        console.print(table)


def report(results_file: Path, preset: str, model: str, console: Console) -> None:
    """All tables of what is there of one preset and base, and one picture beside the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [r for r in load_results(results_file).values() if (r["preset"], r["asked"]["model"]) == (preset, model)]
    tasks = sorted({r["task"] for r in results})
    if not tasks:
        console.print(f"nothing measured yet with preset {preset}.")
        return
    figure, panels = plt.subplots(2, len(tasks), figsize=(5.5 * len(tasks), 8), squeeze=False, layout="constrained")
    for column, task in enumerate(tasks):
        of = lambda job, task=task: [r for r in results if r["task"] == task and r["job"] == job]  # noqa: E731
        for title, (jobs, names) in TABLES.items():
            table = Table(title=f"{task}, {title} ({preset})")
            for name in ("", *names, "seeds"):
                table.add_column(name, justify="left" if not name else "right")
            for job in jobs:
                if runs := of(job):
                    percent = (mean_and_spread([100 * run[name] for run in runs]) for name in names)
                    table.add_row(job, *percent, str(len(runs)))
            console.print(table)
        print_gates(task, of("gates"), console)
        panel = panels[0][column]
        markers = {"s1": "s", "s3": "v", "s2": "D", "spa": "o", "spa, no budget": "P", "spa, disagreement": "X"}
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for colour, (job, marker) in zip(colours, markers.items(), strict=False):
            for runs, label, filled in ((of(job), job, "full"), (of(f"{job}, all"), f"{job}, all data", "none")):
                if runs:
                    x, y = ([100 * r[name] for r in runs] for name in ("usage", "rougeL"))
                    panel.plot(x, y, marker, color=colour, fillstyle=filled, label=label)
        for job, style in (("zero-shot", ":"), ("one-shot", "--"), ("lora", "-.")):
            for run in of(job)[:1]:
                panel.axhline(100 * run["rougeL"], ls=style, color="tab:gray", label=job)
        panel.set(title=task, xlabel="tokens with the side network, %", ylabel="Rouge-L, test")
        panel.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # over no point
        panel = panels[1][column]
        for job in ("serial", "parallel", "ladder"):
            if runs := of(job):
                losses = np.array([r["losses"] for r in runs])
                spread = losses.std(0, ddof=1) if len(runs) > 1 else None
                panel.errorbar(range(losses.shape[1]), losses.mean(0), spread, marker="o", capsize=2, label=job)
        panel.set(xlabel="epochs", ylabel="validation loss of f + g, nats a token")
        if panel.lines:
            panel.legend(fontsize=8)
    file = results_file.with_name(f"spa_tables_{preset}.png")
    figure.savefig(file, dpi=120)
    console.print(f"wrote {file}")
