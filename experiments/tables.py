"""Tables in Markdown of what is in results/*.json. Nothing here is typed that was measured; see index.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from store import final_score, load_results, mean_and_spread

RESULTS = Path(__file__).parent / "results"
PRESETS = ("paper", "h200", "cpu")
"""The larger first: where several were run, the index speaks of that."""


@dataclass(frozen=True)
class Finding:
    """What was measured, as text, with which seeds and machine; ``same``: in the paper's direction, if it has one.

    ``close``: the difference that decides it is within its spread over the seeds.
    """

    measured: str
    same: bool | None
    where: str
    close: bool = False


NOTHING = "Nothing measured yet."


def show() -> Finding | None:
    """A text of a plugin, and whose tokens it is made of."""
    if not (found := read("spa_show")):
        return None
    shares = ", ".join(f"{name} {share(found[name])}" for name in ("usage", "diff", "pick"))
    told = f"`{found['text'].strip()}`: {shares}; ![each token by who chose it](results/spa_show.png)"
    return Finding(told, None, "one text, SPA of seed 0 on wiki-description")


def read(name: str) -> dict:
    return load_results(RESULTS / f"{name}.json")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(runs: Sequence[dict]) -> str:
    """How many seeds, on what."""
    seeds, devices = {run["seed"] for run in runs}, {run["device"] for run in runs}
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return f"{count}, {', '.join(sorted('a CPU' if device == 'cpu' else device for device in devices))}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def number(value: float) -> str:
    """A perplexity, which may be 20 or a million."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


accuracy = "{:.3f}".format


def published(study: str) -> list[dict]:
    """A study's runs of its presets as they are; those of another model or task are not for the pages (run_key)."""
    return [run for key, run in read(study).items() if key.split("/")[0] in PRESETS]


def chosen(study: str) -> list[dict]:
    """The runs of the largest preset that has any."""
    for preset in PRESETS:
        if runs := [run for run in published(study) if run["preset"] == preset]:
            return runs
    return []


# ------------------------------------------------------------------------------------------------------------- MLFS
def demo() -> str:
    palette = read("demo_palette")
    batches = list(palette["rows"][0]["latency_ratio"])
    columns = ["subnet", "parameters without embeddings [M]", "whole HF checkpoint [M]", "GFLOP"]
    columns += [f"time, batch {batch}" for batch in batches] + [f"test {palette['metric']}"]
    rows = []
    for row in palette["rows"]:
        sizes = [f"{row['params_body'] / 1e6:.2f}", f"{row['params_exported'] / 1e6:.2f}", f"{row['flops'] / 1e9:.3f}"]
        rows.append([row["name"], *sizes, *(f"{row['latency_ratio'][b]:.2f}" for b in batches), accuracy(row["score"])])
    said = (
        f"{palette['examples']:,} examples of the {palette['split']} split; always answering the commonest class is "
        f"right for {accuracy(palette['baseline'])} of them. Times are shares of the maxnet's, on {palette['device']}."
    )
    return f"{said}\n\n{markdown(columns, rows)}"


def execution() -> str:
    rows = read("bench_execution")["rows"]
    names = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in rows if name != "maxnet"))
    cells = []
    for name in names:
        masked, sliced = rows[f"{name} masked"], rows[f"{name} sliced"]
        cells.append([name, *(f"{x:.2f}" for x in (masked["flops_share"], masked["of_maxnet"], sliced["of_maxnet"]))])
    return markdown(("subnet", "FLOPs", "masked", "sliced"), cells)


def encoder() -> str:
    cells = []
    results = [run for run in published("mlfs_encoder_palette") if "palette" in run]
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            runs = [run for run in results if (run["preset"], run["task"]) == (preset, task)]
            for name in runs[0]["palette"] if runs else ():
                scores = [final_score(run["palette"][name]) for run in runs]
                size = runs[0]["palette"][name]["share"]
                cells.append([f"{task}, {name}", f"{size:.2f}", mean_and_spread(scores, accuracy), where(runs), preset])
            if alone := [final_score(run["baseline"]) for run in runs if "baseline" in run]:
                size = runs[0]["palette"]["quarter"]["share"]
                what = f"{task}, *cut to a quarter, trained alone*"
                cells.append([what, f"{size:.2f}", mean_and_spread(alone, accuracy), where(runs), preset])
    return markdown(("subnet", "share of the body", "test score", "measured with", "preset"), cells)


def choice_runs() -> list[dict]:
    """Those of the study's own model and task; it can be asked for others."""
    return [r for r in read("mlfs_choices").values() if (r["model"], r["task"]) == ("bert-tiny", "wiki-topic")]


def choices() -> str:
    runs, cells = choice_runs(), []
    if not runs:
        return NOTHING
    names = list(runs[0]["scores"])
    for arm in dict.fromkeys(run["arm"] for run in runs):
        scores = [run["scores"] for run in runs if run["arm"] == arm]
        passes = {run["passes"] for run in runs if run["arm"] == arm}
        shown = [mean_and_spread([score[name]["accuracy"] for score in scores], accuracy) for name in names]
        cells.append(
            [
                arm,
                " / ".join(f"{n:,}" for n in sorted(passes)),
                *shown,
                mean_and_spread([score["minnet"]["loss"] for score in scores], accuracy),
            ]
        )
    cells.sort(key=lambda row: (row[0] != "three stages", row[0]))
    columns = ("way", "passes", *names, "loss of the minnet")
    return f"Test accuracy, {where(runs)}.\n\n{markdown(columns, cells)}"


def decoder() -> str:
    cells, whole = [], set()
    for preset in PRESETS:
        results = [run for run in published("mlfs_decoder") if run["preset"] == preset]
        whole |= {number(run["teacher"]) for run in results}
        for arm in dict.fromkeys(run["arm"] for run in results):
            runs = [run for run in results if run["arm"] == arm]
            curves = [list(run["curve"].values()) for run in runs]
            ends = [mean_and_spread([curve[i] for curve in curves], number) for i in (0, -1)]
            steps = list(runs[0]["curve"])[-1]
            cells.append([arm, f"{runs[0]['share']:.2f}", *ends, steps, where(runs), preset])
    columns = ("how", "share of the body", "at the start", "at the end", "steps", "measured with", "preset")
    return f"Validation perplexity; the whole model has {' and '.join(whole)}.\n\n{markdown(columns, cells)}"


# -------------------------------------------------------------------------------------------------------------- SPA
SPA_JOBS = {
    "zero-shot": "zero-shot prompt",
    "one-shot": "one-shot prompt",
    "lora": "LoRA, one epoch",
    "adapter": "adapters (Houlsby), one epoch",
    "parallel-adapter": "parallel adapters, one epoch",
    "s3": "S3 (LST): the side network alone, of S2's fit, whose gate has 15 % of the data",
    "s2": "S2: one or the other",
    "spa": "SPA, threshold for the wanted usage",
    "spa, no budget": "SPA, threshold 1/2",
    "spa, medium": "SPA, threshold 1/2, medium data",
    "spa, small": "SPA, threshold 1/2, small data",
    "spa, small, started": "SPA, threshold 1/2, small data, begun with a plugin of all data of the other task",
    "spa, started": "SPA, threshold for the wanted usage, begun with a plugin of all data of the other task",
    "s1": "S1: the side network at every token",
    "s3, all": "S3 (LST), all training data",
    "s2, all": "S2, all training data",
    "spa, all": "SPA, all training data",
    "spa, disagreement, all": "SPA, a gate that learns where the two sides differ, all training data",
    "spa, no budget, all": "SPA, threshold 1/2, all training data",
    "s1, all": "S1, all training data",
}


def spa() -> str:
    cells, results = [], published("spa_tables")
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            for job, said in SPA_JOBS.items():
                runs = [run for run in results if (run["preset"], run["task"], run["job"]) == (preset, task, job)]
                if runs:
                    scores = [mean_and_spread([100 * run[f"rouge{n}"] for run in runs]) for n in (1, 2, "L")]
                    used = [100 * run["usage"] for run in runs if "usage" in run]
                    usage = mean_and_spread(used, "{:.0f}".format) + " %" if used else ""
                    cells.append([f"{task}, {said}", *scores, usage, where(runs), preset])
    columns = ("", "Rouge-1", "Rouge-2", "Rouge-L", "tokens that asked the side network", "measured with", "preset")
    return markdown(columns, cells)


SPA_SUMMARY = {
    "one-shot": "one-shot prompt",
    "s3": "S3 (LST): $g$",
    "s2": "S2: $f$ or $g$",
    "spa": "SPA: $f + \\sigma g$",
    "spa, started": "SPA, begun with a plugin of all data of the other task",
    "s1": "S1: $f + g$",
    "lora": "LoRA in the base, one epoch",
    "adapter": "adapters (Houlsby) in the base, one epoch",
    "parallel-adapter": "parallel adapters in the base, one epoch",
}


def spa_summary() -> str:
    """Rouge-L alone, a column for each task and amount of data."""
    runs = chosen("spa_tables")
    if not runs:
        return NOTHING
    rougeL, counts = {}, {}
    for run in runs:
        amount = ", all" if run["job"].endswith(", all") else ""
        rougeL.setdefault((run["task"], amount, run["job"].removesuffix(", all")), []).append(run)
        counts[run["task"], amount] = "all training examples" if amount else f"{run['asked']['train']:,} examples"
    columns = sorted(counts)

    def cell(column: tuple[str, str], job: str) -> str:
        found = rougeL.get((*column, job), [])
        usage = [100 * run["usage"] for run in found if job.startswith("spa")]
        asked = f" ({np.mean(usage):.0f} % asked)" if usage else ""
        return mean_and_spread([100 * run["rougeL"] for run in found]) + asked if found else ""

    rows = [[said, *(cell(column, job) for column in columns)] for job, said in SPA_SUMMARY.items()]
    return markdown(("", *(f"{task}, {counts[task, amount]}" for task, amount in columns)), rows)


def quantised() -> str:
    runs = list(read("spa_quantised").values())
    if not runs:
        return NOTHING
    cells = []
    for bits in sorted({run["bits"] for run in runs}, reverse=True):
        of = [run for run in runs if run["bits"] == bits]
        sizes = [f"{of[0]['bytes'][name] / 1e6:,.0f}" for name in ("layers", "lora", "side network")]
        loss = [mean_and_spread([run["loss"][name] for run in of], accuracy) for name in ("base", "lora")]
        cells.append([str(bits), *sizes, *loss, str(len(of))])
    config = runs[0]["config"]
    columns = ("bits", "layers of the base [MB]", "LoRA step [MB]", "side network's step [MB]", "loss of the base")
    columns += (f"after {config['steps']} steps of LoRA", "seeds")
    return f"{config['model']} on {config['task']}, {runs[0]['device']}.\n\n{markdown(columns, cells)}"


def spa_gates() -> str:
    cells, results = [], [run for run in published("spa_tables") if run["job"] == "gates"]
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            runs = [run for run in results if (run["preset"], run["task"]) == (preset, task)]
            for method in runs[0]["gates"] if runs else ():
                of = [run["gates"][method] for run in runs]
                spread = [mean_and_spread([100 * gate[name] for gate in of]) for name in ("usage", "pick")]
                spread += [mean_and_spread([100 * gate["gated_accuracy"] for gate in of])]
                spread += [mean_and_spread([gate["gated_loss"] for gate in of], "{:.3f}".format)]
                cells.append([f"{task}, {method}", *spread, where(runs), preset])
    columns = ("gate", "usage, %", "pick, %", "token accuracy, %", "loss, nats", "measured with", "preset")
    return markdown(columns, cells) if cells else NOTHING


def latency() -> str:
    return _latency(read("spa_latency"), "is set to")


def latency_plugin() -> str:
    return _latency(read("spa_latency_plugin"), "was measured as")


def _latency(found: dict, has: str) -> str:
    if not found:
        return NOTHING
    links = list(dict.fromkeys((row["link"]["rtt_ms"], row["link"]["bandwidth_mb_s"]) for row in found["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    cells = []
    for link in links:
        rows = {r["method"]: r for r in found["rows"] if (r["link"]["rtt_ms"], r["link"]["bandwidth_mb_s"]) == link}
        told = [f"{rows[m]['predicted']['total']:.0f} / {rows[m]['measured']['total']:.0f}" for m in methods]
        cells.append([f"{link[0]:g} ms, {link[1]:g} MB/s", *told])
    errors = [abs(row["error"]) for row in found["rows"]]
    said = (
        f"ms a token, predicted / measured over an emulated link, {found['tokens']} tokens each; the cloud's part "
        f"{has} {found['cloud_ms']:.3g} ms, the device's {found['device_ms']:.2g} ms. The prediction is off by "
        f"{share(max(errors))} at most, by more than 15 % in {sum(e > 0.15 for e in errors)} of {len(errors)} cells."
    )
    return f"{said}\n\n{markdown(('link', *methods), cells)}"


PARTS = {
    "demo": demo,
    "execution": execution,
    "encoder": encoder,
    "choices": choices,
    "decoder": decoder,
    "spa": spa,
    "spa-summary": spa_summary,
    "spa-gates": spa_gates,
    "quantised": quantised,
    "latency": latency,
    "latency-plugin": latency_plugin,
}
"""Name of a generated part of a page -> what makes it."""
