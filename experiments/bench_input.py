"""Does the step wait for its input? Steps over real batches beside steps over one batch again and again.

    python experiments/bench_input.py              # three minutes on 2 cores

Both sides take turns in one process, a block of steps each, as ``fit`` makes them: the batch is put together from
encoded texts while the device still works on the step before. Wall time of a block; the median over the rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlfs_jax as mlfs
from mlfs_jax.data.batches import Batches
from mlfs_jax.data.tasks import get_task
from mlfs_jax.supernet import Supernet
from mlfs_jax.timing import device_name

RESULT = Path(__file__).parent / "results" / "bench_input.json"
SHAPES = {"bert-tiny": 32, "minilm-l6": 16}


@dataclass(frozen=True)
class Options:
    """How much is timed.

    Attributes:
        block: steps between two looks at the clock.
        rounds: pairs of blocks.
    """

    block: int = 10
    rounds: int = 15
    length: int = 48


def measure(name: str, batch_size: int, options: Options) -> dict[str, float]:
    """Median seconds of a step on either side, and of the batch alone."""
    config = mlfs.FitConfig(name, "wiki-topic", max_length=options.length, buckets=(options.length,))
    task = get_task(config.task)
    model = config.load_model(task)
    train = config.load_data(task, model)["train"]
    batches = Batches(train, batch_size, seed=0, buckets=config.buckets)
    stage = config.stages[0]
    supernet = Supernet(model.config, config.distill, stage.optimizer(), unroll=True)
    lora = mlfs.init_lora(jax.random.key(0), model, rank=stage.rank, full=("head",))
    state = jax.device_put(supernet.init({"lora": lora}), jax.devices()[0])
    sides = {"real": batches.__getitem__, "repeated": lambda step, again=batches[0]: again}
    seconds: dict[str, list[float]] = {side: [] for side in (*sides, "batch")}
    for round_ in track(range(options.rounds + 1), name):
        for side, batch_at in sides.items():
            begin = time.perf_counter()
            for step in range(options.block):
                state, losses = supernet.step(state, model.base, batch_at(round_ * options.block + step), (), 0.0)
            jax.block_until_ready(losses)
            seconds[side].append((time.perf_counter() - begin) / options.block)
        begin = time.perf_counter()
        for step in range(options.block):
            batches[round_ * options.block + step]
        seconds["batch"].append((time.perf_counter() - begin) / options.block)
    return {side: statistics.median(times[1:]) for side, times in seconds.items()}  # the first is compilation


def main(options: Options) -> None:
    rows = {}
    table = Table(title=f"seconds of a LoRA step, {options.rounds} pairs of {options.block} steps")
    for column in ("model", "real batches", "one batch", "ratio", "making a batch"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, batch_size in SHAPES.items():
        row = rows[name] = measure(name, batch_size, options)
        row["ratio"] = row["real"] / row["repeated"]
        times = (f"{row[side]:.4f}" for side in ("real", "repeated"))
        table.add_row(f"{name}, {batch_size} x {options.length}", *times, f"{row['ratio']:.3f}", f"{row['batch']:.5f}")
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"cpu": device_name(), **vars(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
