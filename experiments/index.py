"""One row for each table and figure of the two papers; and the generated parts of the pages that show measurements.

    python experiments/index.py            # write the generated parts of README.md and experiments/README.md anew
    python experiments/index.py --check    # exit code 1 when one is not what results/*.json say

What stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` comes from :data:`SECTIONS`. What a paper says and
why ours differs is written here by hand, for either outcome; whether it differs follows from the numbers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bench_tables
import tables
import tyro
from findings import (
    against_alone,
    alpha,
    blocks,
    choices,
    in_order,
    jobs,
    palette_kept,
    palette_latency,
    rates,
    resists,
    table2,
)
from tables import Finding

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
        if found.close and found.same is not None:
            same += ", within the spread of the seeds"
        return [self.source, self.says, command, f"{found.measured} ({found.where})", same, why]


# ------------------------------------------------------------------------------------------------------------- MLFS
ENCODER, DECODER = "python experiments/mlfs_encoder_palette.py", "python experiments/mlfs_decoder.py"
LATENCY = "experiments/results/spa_latency"
CHOICES, ENDS = "python experiments/mlfs_choices.py", ("maxnet", "minnet")
MLFS = (
    Row(
        "palette, accuracy",
        "encoders keep their accuracy down to 1/4 of the size (here: to within 0.02)",
        ENCODER,
        palette_kept,
        other="the runs are short",
    ),
    Row(
        "palette, latency",
        "1/4 of the size takes about 1/3 of the time",
        "make demo",
        palette_latency,
        other="small matrices do not use the machine as well as large ones",
    ),
    Row(
        "naive baseline",
        "[ours] one small model, cut naively, trained alone, as many steps: is the palette's as good?",
        ENCODER,
        against_alone,
        other="a short budget is better spent on one size; the palette is for several sizes, or many steps",
    ),
    Row(
        "equal total budget",
        "[ours] as many small models, cut by importance too, as the palette has sizes, for its passes together",
        CHOICES,
        lambda: choices(
            ENDS, "accuracy", {"three stages": "palette", "alone, best k": "alone", "alone": "alone, cut naively"}
        ),
        other="each size pays for sharing its adapter; against a naive cut the small ones gain by their order alone",
    ),
    Row(
        "stages",
        "three stages against one, by as many passes through a network (the table below has their number)",
        CHOICES,
        lambda: choices(ENDS, "accuracy", {"three stages": "three", "one stage, equal passes": "one"}),
        same="the lower rate of their last stage: with one rate, as one stage has, they are equal within the spread",
        other="two layers, in which all subnets can learn at once",
    ),
    Row(
        "importance order",
        "[ours] the best k against the first k, encoders",
        CHOICES,
        lambda: choices(("minnet",), "accuracy", {"three stages": "best k", "first k": "first k"}),
    ),
    Row(
        "Fig. 2, gradient scaling",
        "it lowers the loss of the smallest subnet",
        CHOICES,
        lambda: choices(("minnet",), "loss", {"gamma 1": "gamma 1", "three stages": "0", "gamma 2": "2"}),
        other="the loss hardly depends on gamma: what it changes is within the spread of the seeds",
    ),
    Row(
        "Fig. 5, start",
        "a slice of the pretrained weights learns far faster than random weights",
        DECODER,
        lambda: in_order({"sliced start, all weights": "sliced", "random start, all weights": "random"}),
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
        lambda: in_order({"width, alpha 0.9": "best k", "width, first-k": "first k"}),
    ),
)


# -------------------------------------------------------------------------------------------------------------- SPA
SHOW = "spa show RUN --prompt TEXT --json --png experiments/results/spa_show.png > experiments/results/spa_show.json"
TABLES, GATE = "python experiments/spa_tables.py", {"s1": "S1", "spa": "SPA"}
SPA = (
    Row(
        "Table 1, with LST",
        "Rouge-L: SPA above LST above one-shot prompting",
        TABLES,
        jobs({"spa": "SPA", "s3": "LST", "one-shot": "one-shot"}, "rougeL"),
    ),
    Row(
        "Table 1, prompting",
        "Rouge-L: SPA above one-shot prompting",
        TABLES,
        jobs({"spa": "SPA", "one-shot": "one-shot"}, "rougeL"),
        same="an example in the prompt helps; training on hundreds helps more",
    ),
    Row(
        "Table 1, LoRA",
        "as many parameters inside the base, which ask the cloud at every layer (our notes have no figures)",
        f'{TABLES} --jobs lora "spa, all"',
        jobs({"lora": "LoRA, one epoch", "spa, all": "SPA, all data", "spa": "SPA"}, "rougeL", judged=False),
    ),
    Row(
        "Tables 1 and 3, all data",
        "the same order, on all training examples, where the rows above are of 1,000",
        f'{TABLES} --jobs "s1, all" "spa, all" "s2, all" "s3, all"',
        jobs({"s1, all": "S1", "spa, all": "SPA", "s2, all": "S2", "s3, all": "LST", "one-shot": "one-shot"}, "rougeL"),
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
        jobs(GATE | {"s2": "S2", "s3": "S3"}, "rougeL"),
    ),
    Row(
        "Table 3, the price of the gate",
        "SPA is close to S1 (here: within 1 point of Rouge-L)",
        TABLES,
        jobs(GATE, "rougeL", within=1),
        other="every token that skips the side network is one that it could have improved",
    ),
    Row(
        "Table 5, amount of data",
        "Rouge-L grows from small to medium to full data",
        TABLES,
        jobs({"spa, no budget": "full", "spa, medium": "medium", "spa, small": "small"}, "rougeL"),
    ),
    Row(
        "Table 6, usage",
        "with more data the side network is asked less: 82, 72, 62 % of tokens",
        TABLES,
        jobs({"spa, small": "small", "spa, medium": "medium", "spa, no budget": "full"}, "usage"),
        other="our gate asks where the side network is worth more than its price; one that has learnt little seldom is",
    ),
    Row(
        "Table 7, diff and pick",
        "how often the two sides differ, and whom the gate then picks (here: the side network, more than elsewhere)",
        TABLES,
        rates,
    ),
    Row(
        "Table 3, the gate, all data",
        "SPA is close to S1 (here: within 1 point of Rouge-L), with a gate that learns by likelihood, at a price",
        f'{TABLES} --jobs "s1, all" "spa, all" "spa, disagreement, all"',
        jobs(
            {"s1, all": "S1", "spa, all": "SPA", "spa, disagreement, all": "SPA, where the two sides differ"},
            "rougeL",
            within=1,
        ),
    ),
    Row(
        "a start with another task's plugin",
        "[ours] a plugin that begins with what another has learnt, on much data of the other task, is the better one",
        f'{TABLES} --tasks wiki-description-es --jobs "spa, started" "spa, small, started"',
        jobs({"spa, started": "begun so", "spa": "SPA"}, "rougeL"),
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
