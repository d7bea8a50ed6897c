"""One row for each table and figure of the two papers; and the generated parts of the pages that show measurements.

    python experiments/index.py            # write the generated parts of README.md and experiments/README.md anew
    python experiments/index.py --check    # exit code 1 when one is not what results/*.json say

What stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` comes from :data:`SECTIONS`. What a paper says and
why ours differs is written here by hand, for either outcome; whether it differs follows from the numbers.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_tables
import tables
import tyro
from store import final_score, mean_and_spread
from tables import Finding, accuracy, chosen, number, read, share, where

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One table or figure.

    Attributes:
        says: what the paper reports, or what the comparison asks.
        command: empty: there is no script for it yet.
        find: None while nothing is measured.
        same, other: why, when the direction is the paper's, and when it is not.
    """

    source: str
    says: str
    command: str
    find: Callable[[], Finding | None] = lambda: None
    same: str = ""
    other: str = ""

    def cells(self) -> list[str]:
        found, command = self.find(), f"`{self.command}`" if self.command else "not built yet"
        if found is None:
            return [self.source, self.says, command, "nothing yet", "", ""]
        same, why = {True: ("yes", self.same), False: ("**no**", self.other or "not explained yet"), None: ("", "")}[
            found.same
        ]
        return [self.source, self.says, command, f"{found.measured} ({found.where})", same, why]


# ------------------------------------------------------------------------------------------------------------- MLFS
def _encoder(better: Callable[[dict], tuple[float, float]], names: tuple[str, str], slack: float) -> Finding | None:
    """Two scores of each run side by side, for each task; same: the second is at least the first, less ``slack``."""
    runs = [run for run in chosen("mlfs_encoder_palette") if "palette" in run and "baseline" in run]
    told, same = [], True
    for task in dict.fromkeys(run["task"] for run in runs):
        first, second = zip(*(better(run) for run in runs if run["task"] == task), strict=True)
        scores = [mean_and_spread(x, accuracy) for x in (first, second)]
        told.append(f"{task}: {names[0]} {scores[0]}, {names[1]} {scores[1]}")
        same &= statistics.mean(second) >= statistics.mean(first) - slack
    return Finding("; ".join(told), same, where(runs)) if runs else None


def _score(run: dict, name: str) -> float:
    return final_score(run["palette"][name] if name in run["palette"] else run[name])


def palette_kept() -> Finding | None:
    return _encoder(lambda run: (_score(run, "maxnet"), _score(run, "quarter")), ("whole", "quarter"), 0.02)


def against_alone() -> Finding | None:
    return _encoder(lambda run: (_score(run, "baseline"), _score(run, "quarter")), ("alone", "from the palette"), 0.0)


def palette_latency() -> Finding:
    palette = read("demo_palette")
    whole, quarter = (next(r for r in palette["rows"] if r["name"] == name) for name in ("maxnet", "quarter"))
    size, times = quarter["params_body"] / whole["params_body"], quarter["latency_ratio"]
    told = ", ".join(f"{share(time)} of the time at batch {batch}" for batch, time in times.items())
    return Finding(f"{share(size)} of the body takes {told}", max(times.values()) <= 1 / 3, palette["device"])


def _arms() -> tuple[dict[str, list[float]], list[dict]]:
    """The final perplexities of each arm of the decoder's study, and its runs."""
    runs = chosen("mlfs_decoder")
    names = dict.fromkeys(run["arm"] for run in runs)
    return {name: [list(r["curve"].values())[-1] for r in runs if r["arm"] == name] for name in names}, runs


def _perplexities(names: dict[str, str], same: Callable[[list[float]], bool]) -> Finding | None:
    """Arms side by side, by final perplexity; ``same`` judges their means."""
    arms, runs = _arms()
    if not names.keys() <= arms.keys():
        return None
    told = ", ".join(f"{said} {mean_and_spread(arms[name], number)}" for name, said in names.items())
    return Finding(f"perplexity {told}", same([statistics.mean(arms[name]) for name in names]), where(runs))


def _ordered(names: dict[str, str]) -> Finding | None:
    """The best first."""
    return _perplexities(names, lambda means: means == sorted(means))


def alpha() -> Finding | None:
    names = {f"width, alpha {a}": f"with {a}:" for a in ("0.9", "0.5", "0")}
    return _perplexities(names, lambda means: max(means[:2]) < means[2])


def resists() -> Finding | None:
    arms, runs = _arms()
    if not arms:
        return None
    best = min(arms, key=lambda name: statistics.mean(arms[name]))
    told = f"the best of {len(arms)} ways ({best}) has perplexity {mean_and_spread(arms[best], number)}"
    return Finding(f"{told}, the whole model {number(runs[0]['teacher'])}; nothing smaller trained", None, where(runs))


def _choices(subnets: tuple[str, ...], metric: str, names: dict[str, str]) -> Finding | None:
    """Arms of the encoder's study side by side; same: the first is at least as good as the second, for each."""
    runs = tables.choice_runs()
    arms = {arm: [run["scores"] for run in runs if run["arm"] == arm] for arm in names}
    if not all(arms.values()):
        return None
    told, same, sign = [], True, -1 if metric == "loss" else 1
    for subnet in subnets:
        values = {arm: [sign * score[subnet][metric] for score in scores] for arm, scores in arms.items()}
        means = [statistics.mean(v) for v in values.values()]
        same &= means[0] >= means[1]
        shown = (f"{names[arm]} {mean_and_spread([sign * x for x in v], accuracy)}" for arm, v in values.items())
        told.append(f"{subnet}: {', '.join(shown)}")
    return Finding(f"{metric}, {'; '.join(told)}", same, where([r for r in runs if r["arm"] in names]))


ENCODER, DECODER = "python experiments/mlfs_encoder_palette.py", "python experiments/mlfs_decoder.py"
LATENCY = "experiments/results/spa_latency"
CHOICES, ENDS = "python experiments/mlfs_choices.py", ("maxnet", "minnet")
MLFS = (
    Row(
        "palette, accuracy",
        "encoders keep their accuracy down to 1/4 of the size (here: to within 0.02)",
        ENCODER,
        palette_kept,
        other="a short run on small data; the subnets are still learning when it ends",
    ),
    Row(
        "palette, latency",
        "1/4 of the size takes about 1/3 of the time",
        "make demo",
        palette_latency,
        same="the sliced model is narrower in every layer, which is what time depends on",
        other="small matrices do not use the machine as well as large ones",
    ),
    Row(
        "honest baseline",
        "[ours] one small model, trained alone for its one size, as many steps: is the palette's as good?",
        ENCODER,
        against_alone,
        other="a short budget is better spent on one size; the palette is for several sizes, or many steps",
    ),
    Row(
        "equal total budget",
        "[ours] as many small models as the palette has sizes, for the palette's passes together",
        CHOICES,
        lambda: _choices(ENDS, "accuracy", {"three stages": "from the palette", "alone": "alone"}),
        other="the small ones gain by the palette, the large ones pay for sharing their adapter with them",
    ),
    Row(
        "stages",
        "three stages against one, by as many passes through a network (the table below has their number)",
        CHOICES,
        lambda: _choices(ENDS, "accuracy", {"three stages": "three", "one stage, equal passes": "one"}),
        same="the lower rate of their last stage: with one rate, as one stage has, they are equal within the spread",
        other="two layers, in which all subnets can learn at once",
    ),
    Row(
        "importance order",
        "[ours] the best k against the first k, encoders",
        CHOICES,
        lambda: _choices(("minnet",), "accuracy", {"three stages": "best k", "first k": "first k"}),
    ),
    Row(
        "Fig. 2, gradient scaling",
        "it lowers the loss of the smallest subnet",
        CHOICES,
        lambda: _choices(("minnet",), "loss", {"gamma 1": "gamma 1", "three stages": "0", "gamma 2": "2"}),
        other="the loss hardly depends on gamma: what it changes is within the spread of the seeds",
    ),
    Row(
        "Fig. 5, start",
        "a slice of the pretrained weights learns far faster than random weights",
        DECODER,
        lambda: _ordered({"sliced start, all weights": "sliced", "random start, all weights": "random"}),
        same="the slice starts with what the teacher knows",
    ),
    Row(
        "Fig. 7, alpha",
        "learning from the teacher too (alpha above 0) beats learning from the labels alone",
        DECODER,
        alpha,
        same="a teacher's distribution says more of each token than the token",
        other="in so few steps the differences are within the spread of the seeds; longer runs have not been made",
    ),
    Row(
        "decoders at 2/3",
        "decoders resist: about 2/3 of the size at most",
        DECODER,
        resists,
    ),
    Row(
        "order, decoders",
        "[ours] the best k against the first k",
        DECODER,
        lambda: _ordered({"width, alpha 0.9": "best k", "width, first-k": "first k"}),
    ),
)


# -------------------------------------------------------------------------------------------------------------- SPA
def _of_each_task(judge: Callable[[list[dict]], tuple[str, bool | None, list[dict]] | None]) -> Callable:
    """A finding of all tasks from what ``judge`` says of the runs of one: what to tell, same or not, by which runs."""

    def find() -> Finding | None:
        results, told, same, used = chosen("spa_tables"), [], [], []
        for task in sorted({run["task"] for run in results}):
            if found := judge([run for run in results if run["task"] == task]):
                told.append(f"{task}: {found[0]}")
                same.append(found[1])
                used += found[2]
        return Finding("; ".join(told), None if None in same else all(same), where(used)) if told else None

    return find


def _jobs(names: dict[str, str], field: str, within: float | None = None) -> Callable:
    """A field of several jobs, in percent, in the order that the paper finds, for each task that has all of them.

    Of the seeds that all of them were run with; prompting has none. ``within``: the first two are to be as close.
    """

    @_of_each_task
    def find(results):
        runs = {name: [r for r in results if r["job"] == name] for name in names}
        seeds = [{r["seed"] for r in of} for name, of in runs.items() if name not in ("zero-shot", "one-shot")]
        known = set.intersection(*seeds)
        if not known or not all(runs.values()):
            return None
        runs = {name: [r for r in of if r["seed"] in known] or of for name, of in runs.items()}
        values = {name: [100 * r[field] for r in of] for name, of in runs.items()}
        means = [statistics.mean(v) for v in values.values()]
        same = means == sorted(means, reverse=True) if within is None else means[0] - means[1] <= within
        told = ", ".join(f"{said} {mean_and_spread(values[name])}" for name, said in names.items())
        return told, same, [r for of in runs.values() for r in of]

    return find


def table2() -> Finding | None:
    found = read("spa_latency")
    if not found:
        return None
    link = {"rtt_ms": 20.0, "bandwidth_mb_s": 10.0}
    at = {r["method"]: r for r in found["rows"] if link.items() <= r["link"].items()}
    by_link: dict[str, list[float]] = {}
    for row in found["rows"]:
        by_link.setdefault(str(row["link"]), []).append(row["measured"]["total"])  # spa, lst, lora, adapter
    told = ", ".join(f"{name} {row['measured']['total']:.0f}" for name, row in at.items())
    fastest = all(min(times) == times[0] and times[1] < min(times[2:]) for times in by_link.values())
    return Finding(f"ms a token at 20 ms and 10 MB/s: {told}", fastest, f"{found['tokens']} tokens, emulated link")


@_of_each_task
def rates(results):
    runs = [run for run in results if run["job"] == "spa"]
    if not runs:
        return None
    diff, pick = (mean_and_spread([100 * run[name] for run in runs]) for name in ("diff", "pick"))
    told = f"the sides differ on {diff} % of tokens, and the gate then picks the side network for {pick} %"
    return told, all(run["pick"] > run["usage"] for run in runs), runs


@_of_each_task
def blocks(results):
    runs = {name: [r for r in results if r["job"] == name] for name in ("parallel", "serial", "ladder")}
    if not all(runs.values()):
        return None
    ends = {name: mean_and_spread([r["losses"][-1] for r in of], "{:.2f}".format) for name, of in runs.items()}
    told = ", ".join(f"{name} {end}" for name, end in ends.items())
    return f"validation loss after the last epoch, nats a token: {told}", None, [r for of in runs.values() for r in of]


SHOW = "spa show RUN --prompt TEXT --json --png experiments/results/spa_show.png > experiments/results/spa_show.json"
TABLES, GATE = "python experiments/spa_tables.py", {"s1": "S1", "spa": "SPA"}
SPA = (
    Row(
        "Table 1, with LST",
        "Rouge-L: SPA above LST above one-shot prompting",
        TABLES,
        _jobs({"spa": "SPA", "s3": "LST", "one-shot": "one-shot"}, "rougeL"),
    ),
    Row(
        "Table 1, prompting",
        "Rouge-L: SPA above one-shot prompting",
        TABLES,
        _jobs({"spa": "SPA", "one-shot": "one-shot"}, "rougeL"),
        same="a small base gains little from an example in its prompt, and much from training",
    ),
    Row(
        "Table 2, time on a network",
        "one exchange a token (SPA, LST) beats one for each layer (the paper's figures are unreadable in our copies)",
        f"spa latency --jitter 0.1 --png {LATENCY}.png --json > {LATENCY}.json",
        table2,
        same="every exchange waits for a round trip",
    ),
    Row(
        "Table 3, settings",
        "quality: S1, then SPA, then S2, then S3",
        TABLES,
        _jobs(GATE | {"s2": "S2", "s3": "S3"}, "rougeL"),
    ),
    Row(
        "Table 3, the price of the gate",
        "SPA is close to S1 (here: within 1 point of Rouge-L)",
        TABLES,
        _jobs(GATE, "rougeL", within=1),
        other="every token that skips the side network is one that it could have improved",
    ),
    Row(
        "Table 5, amount of data",
        "Rouge-L grows from small to medium to full data",
        TABLES,
        _jobs({"spa, no budget": "full", "spa, medium": "medium", "spa, small": "small"}, "rougeL"),
    ),
    Row(
        "Table 6, usage",
        "with more data the side network is asked less: 82, 72, 62 % of tokens",
        TABLES,
        _jobs({"spa, small": "small", "spa, medium": "medium", "spa, no budget": "full"}, "usage"),
        other="our gate asks wherever the two sides would choose differently; one that has learnt little seldom does",
    ),
    Row(
        "Table 7, diff and pick",
        "how often the two sides differ, and whom the gate then picks (here: the side network, more than elsewhere)",
        TABLES,
        rates,
        same="the gate finds the tokens at which the choice matters",
        other="the gate does not see which tokens matter",
    ),
    Row(
        "Fig. 3, blocks",
        "plugin blocks side by side or in a row, by epoch (our notes do not say which wins)",
        TABLES,
        blocks,
    ),
    Row("Fig. 4, who chose", "each token coloured by who chose it: a picture", SHOW, tables.show),
)


def _index(rows: tuple[Row, ...]) -> str:
    columns = ("table, figure", "what the paper says", "command", "measured here", "same direction", "why")
    lines = [columns, ("---",) * len(columns), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "mlfs-index": lambda: _index(MLFS),
    "spa-index": lambda: _index(SPA),
    **tables.PARTS,
    **bench_tables.PARTS,
}


def generated(page: str) -> str:
    """The page with its generated parts as the results are now."""
    return PART.sub(lambda part: f"{part[1]}\n{SECTIONS[part[2]]()}\n\n{part[3]}", page)


def main(check: bool = False) -> None:
    stale = [page for page in PAGES if generated(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is not what the results say: python experiments/index.py")
        else:
            page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
