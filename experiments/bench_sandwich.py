"""A sandwich step (maxnet, two random subnets, minnet) against whittle's, on the same network and the same subnets.

    python experiments/bench_sandwich.py         # makes whittle's virtual environment first

whittle 0.6.0 trains all weights by cross-entropy, as its SandwichStrategy does. We train rank-8 adapters of a frozen
base; "ours" distils from the maxnet over the vocabulary, as MLFS does, "ours, no distillation" has whittle's loss. The
sides take turns on one pinned core, fresh random subnets every round; the figures are CPU-seconds, medians over rounds,
after two rounds of warm-up (ours compiles a step for every width it meets; all widths are met there). Beside them the
FLOPs of one step with whole-depth subnets: torch's own counter for whittle, XLA's cost analysis for ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from peers import Worker, environment, pin, report, take_turns

RESULT = Path(__file__).parent / "results" / "bench_sandwich.json"
WHITTLE = (
    ("torch==2.13.0",),
    ("--no-deps", "whittle==0.6.0", "litgpt==0.5.12"),
    (
        "torch==2.13.0",
        "lightning==2.5.0",
        "syne-tune==0.13.0",
        "transformers==4.53.3",
        "pyarrow<21",
        "boto3==1.34.147",
        "psutil",
    ),
)
WIDTHS = ((6, 1536), (3, 768), (2, 384))
"""Heads and mlp neurons: all, a half, a third and a quarter; with all layers or half of them."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        vocabularies: V, one measurement each.
    """

    vocabularies: tuple[int, ...] = (1024, 32768)
    batch: int = 8
    length: int = 128
    random: int = 2
    rounds: int = 7


def draw(rng: np.random.Generator, layers: int, random: int) -> list[list[int]]:
    """Random subnets, none of them the maxnet or the minnet, and the minnet last."""
    choices = [(*widths, depth) for widths in WIDTHS for depth in (layers, layers // 2)]
    picked = rng.choice(len(choices) - 2, size=random, replace=False) + 1
    return [[int(x) for x in choices[i]] for i in (*picked, -1)]


def measure(vocab_size: int, options: Options) -> dict[str, dict]:
    shape = {"vocab_size": vocab_size, "embed": 384, "layers": 6, "heads": 6, "mlp": 1536}
    setup = {"shape": shape, "batch": options.batch, "length": options.length, "random": options.random}
    setup["family"] = "gpt_neox"
    theirs = environment("whittle", *WHITTLE)
    with (
        Worker(theirs, "whittle_sandwich.py", setup) as whittle,
        Worker(sys.executable, "ours.py", setup | {"alpha": 0.9}) as ours,
        Worker(sys.executable, "ours.py", setup | {"alpha": 0.0}) as plain,
    ):
        sides = {"whittle": whittle, "ours": ours, "ours, no distillation": plain}
        for side in sides.values():  # every width that a draw may meet, so that nothing compiles later
            for widths in WIDTHS:
                side.step(seed=0, subnets=[[*widths, 6]] * options.random + [[*WIDTHS[-1], 3]])
        rng = np.random.default_rng(0)
        whole = [[*widths, shape["layers"]] for widths in (*WIDTHS[: options.random], WIDTHS[-1])]
        flops = {name: side.step(seed=0, subnets=whole, count=True)["flops"] for name, side in sides.items()}
        draws = [draw(rng, shape["layers"], options.random) for _ in range(options.rounds)]
        spent = take_turns(sides, [{"seed": i, "subnets": subnets} for i, subnets in enumerate(draws)])
    return {name: row | {"flops": flops[name]} for name, row in spent.items()}


def main(options: Options) -> None:
    pin()
    results = {str(vocab): measure(vocab, options) for vocab in options.vocabularies}
    title = f"one sandwich step, L6 D384 F1536 heads 6, batch {options.batch} x {options.length}, one core"
    report(RESULT, title, options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
