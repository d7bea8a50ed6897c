"""What was found for each row of the index, from results/*.json, and whether it is in the paper's direction."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import tables
from store import final_score, mean_and_spread
from tables import Finding, accuracy, chosen, number, read, share, where


def _ahead(first: Sequence[float], second: Sequence[float]) -> tuple[bool, bool]:
    """Whether the first way is at least as good; and whether the two differ, seed by seed, by less on average than
    their difference spreads over the seeds. A way without seeds (one value) stands beside each of the other's."""
    ahead, seeds = statistics.mean(first) >= statistics.mean(second), max(len(first), len(second))
    if {len(first), len(second)} - {1, seeds} or seeds < 2:
        return ahead, False
    both = zip(*(list(way) * (seeds if len(way) == 1 else 1) for way in (first, second)), strict=True)
    differences = [a - b for a, b in both]
    return ahead, abs(statistics.mean(differences)) <= statistics.stdev(differences)


def _verdict(each: Sequence[tuple[bool, bool]]) -> tuple[bool, bool]:
    """Of several :func:`_ahead`: all of them; and close, for a yes if one is, for a no if all that speak against it
    are."""
    same = all(ahead for ahead, _ in each)
    return same, any(close for _, close in each) if same else all(close for ahead, close in each if not ahead)


# ------------------------------------------------------------------------------------------------------------- MLFS
def encoder_pair(better: Callable[[dict], tuple[float, float]], names: tuple[str, str], slack: float) -> Finding | None:
    """Two scores of each run side by side, for each task; same: the second is at least the first, less ``slack``."""
    runs = [run for run in chosen("mlfs_encoder_palette") if "palette" in run and "baseline" in run]
    told, each = [], []
    for task in dict.fromkeys(run["task"] for run in runs):
        first, second = zip(*(better(run) for run in runs if run["task"] == task), strict=True)
        each.append(_ahead(second, [x - slack for x in first]))
        scores = [mean_and_spread(x, accuracy) for x in (first, second)]
        told.append(f"{task}: {names[0]} {scores[0]}, {names[1]} {scores[1]}")
    same, close = _verdict(each)
    return Finding("; ".join(told), same, where(runs), close) if runs else None


def _score(run: dict, name: str) -> float:
    return final_score(run["palette"][name] if name in run["palette"] else run[name])


def palette_kept() -> Finding | None:
    return encoder_pair(lambda run: (_score(run, "maxnet"), _score(run, "quarter")), ("whole", "quarter"), 0.02)


def against_alone() -> Finding | None:
    return encoder_pair(
        lambda run: (_score(run, "baseline"), _score(run, "quarter")), ("alone", "from the palette"), 0.0
    )


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


def in_order(names: dict[str, str]) -> Finding | None:
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


def choices(subnets: tuple[str, ...], metric: str, names: dict[str, str]) -> Finding | None:
    """Arms of the encoder's study side by side; same: the first is at least as good as the second, for each."""
    runs = tables.choice_runs()
    arms = {arm: [run["scores"] for run in runs if run["arm"] == arm] for arm in names}
    if not all(arms.values()):
        return None
    told, each, sign = [], [], -1 if metric == "loss" else 1
    for subnet in subnets:
        values = {arm: [sign * score[subnet][metric] for score in scores] for arm, scores in arms.items()}
        each.append(_ahead(*[*values.values()][:2]))
        shown = (f"{names[arm]} {mean_and_spread([sign * x for x in v], accuracy)}" for arm, v in values.items())
        told.append(f"{subnet}: {', '.join(shown)}")
    same, close = _verdict(each)
    return Finding(f"{metric}, {'; '.join(told)}", same, where([r for r in runs if r["arm"] in names]), close)


# -------------------------------------------------------------------------------------------------------------- SPA
def _of_each_task(judge: Callable[[list[dict]], tuple[str, bool | None, list[dict], bool] | None]) -> Callable:
    """A finding of all tasks from what ``judge`` says of the runs of one: what to tell, same or not, by which runs, and
    whether it is within the spread."""

    def find() -> Finding | None:
        results, told, each, used = chosen("spa_tables"), [], [], []
        for task in sorted({run["task"] for run in results}):
            if found := judge([run for run in results if run["task"] == task]):
                told.append(f"{task}: {found[0]}")
                each.append((found[1], found[3]))
                used += found[2]
        same, close = _verdict(each)
        judged = None not in (one for one, _ in each)
        return Finding("; ".join(told), same if judged else None, where(used), close) if told else None

    return find


def jobs(names: dict[str, str], field: str, within: float | None = None, judged: bool = True) -> Callable:
    """A field of several jobs, in percent, in the order that the paper finds, for each task that has all of them.

    Of the seeds that all of them were run with; prompting has none. ``within``: the first two are to be as close.
    ``judged``: the paper does find an order.
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
        if within is None:
            same, close = _verdict([_ahead(*pair) for pair in pairwise(values.values())])
        else:
            first, second = (statistics.mean(v) for v in [*values.values()][:2])
            same, close = first - second <= within, False
        told = ", ".join(f"{said} {mean_and_spread(values[name])}" for name, said in names.items())
        return told, same if judged else None, [r for of in runs.values() for r in of], close

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
    return told, None, runs, False  # the gate is trained on where they differ: that it picks these says little


@_of_each_task
def blocks(results):
    runs = {name: [r for r in results if r["job"] == name] for name in ("parallel", "serial", "ladder")}
    if not all(runs.values()):
        return None
    ends = {name: mean_and_spread([r["losses"][-1] for r in of], "{:.2f}".format) for name, of in runs.items()}
    told = ", ".join(f"{name} {end}" for name, end in ends.items())
    return (
        f"validation loss after the last epoch, nats a token: {told}",
        None,
        [r for of in runs.values() for r in of],
        False,
    )
