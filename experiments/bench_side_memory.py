"""Memory and FLOPs of a training step: a side network beside LoRA, over batch and length, at SmolLM2-135M's shapes.

    python experiments/bench_side_memory.py          # three minutes on 2 cores, all of it compilation

Counted by the compiler; no weight exists and nothing runs. Bytes are arguments (the base is among them) and what the
step makes on the way, in float32; a tenth of the tokens are a completion, whose logits count. Written, with a picture,
to results/bench_side_memory.json and .png.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlfs_jax.config import DecoderConfig, Rope
from spa_jax.cost import Workload, count_bytes, count_flops
from spa_jax.side import SideConfig

RESULT = Path(__file__).parent / "results" / "bench_side_memory.json"
SMOLLM2 = DecoderConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, rope=Rope(1e5, 64))


@dataclass(frozen=True)
class Options:
    """The grid."""

    batches: tuple[int, ...] = (1, 4, 16)
    lengths: tuple[int, ...] = (128, 256, 512)
    rank: int = 8


def measure(batch: int, length: int, rank: int) -> dict[str, dict]:
    """Bytes and FLOPs of each way to train, and what they are of LoRA's."""
    work = Workload(SMOLLM2, batch, length, counted=length // 10)
    ways = {
        "lora": lambda unroll: work.lora_step(unroll=unroll, rank=rank),
        "ladder": lambda unroll: work.side_step(unroll=unroll),
        "ladder, cached taps": lambda unroll: work.side_step(unroll=unroll, cached=True),
        "plugin": lambda unroll: work.side_step(SideConfig(ladder="plugin"), unroll=unroll),
    }
    rows = {name: {"bytes": count_bytes(way(False)), "flops": count_flops(way(True))} for name, way in ways.items()}
    for row in rows.values():
        row |= {f"{of}_share": row[of] / rows["lora"][of] for of in ("bytes", "flops")}
    return rows


def plot(cells: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6, 4))
    tokens = [cell["batch"] * cell["length"] for cell in cells]
    for way in cells[0]["ways"]:
        panel.scatter(tokens, [cell["ways"][way]["bytes"] / 2**30 for cell in cells], label=way)
    panel.set(xscale="log", yscale="log", xlabel="tokens of a batch", ylabel="GiB of a training step (float32)")
    panel.set_title("SmolLM2-135M, as the compiler counts")
    panel.legend()
    figure.tight_layout()
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


def main(options: Options) -> None:
    grid = [(batch, length) for batch in options.batches for length in options.lengths]
    cells = [
        {"batch": batch, "length": length, "ways": measure(batch, length, options.rank)}
        for batch, length in track(grid, "compiling")
    ]
    table = Table(title=f"a training step of SmolLM2-135M, as shares of LoRA's (rank {options.rank})")
    for column in ("batch", "length", "way", "GiB", "of LoRA's", "GFLOP", "of LoRA's"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for cell in cells:
        for way, row in cell["ways"].items():
            bytes_, flops = f"{row['bytes'] / 2**30:.2f}", f"{row['flops'] / 1e9:.0f}"
            shares = f"{row['bytes_share']:.2f}", f"{row['flops_share']:.3f}"
            table.add_row(str(cell["batch"]), str(cell["length"]), way, bytes_, shares[0], flops, shares[1])
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"rank": options.rank, "cells": cells}, indent=1))
    plot(cells)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
