"""How fast deployed subnets of an encoder are: the maxnet and its half, quarter and eighth, at the shapes of MiniLM-L6.

    python experiments/bench_latency.py          # some minutes on 2 cores

Sliced networks with random weights (time does not depend on them), compiled for one batch size and length, run in turn
in one process on one pinned core; medians as shares of the maxnet's, beside the share of FLOPs as the compiler counts
them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from peers import pin
from pictures import share_bars
from rich.console import Console
from rich.table import Table

import mlfs_jax as mlfs
from mlfs_jax.slicing import slice_config
from mlfs_jax.timing import compile_forward, count_flops, device_name, time_in_turn

RESULT = Path(__file__).parent / "results" / "bench_latency.json"


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        seconds: for each batch size.
    """

    batches: tuple[int, ...] = (1, 32)
    length: int = 64
    seconds: float = 60


def main(options: Options) -> None:
    pin()
    shape = {"vocab_size": 30522, "embed": 384, "layers": 6, "heads": 12, "head_dim": 32, "mlp": 1536}
    config = mlfs.EncoderConfig("bert", **shape, max_positions=512, type_vocab=2, head="sequence", labels=11)
    model = mlfs.init_model(config, jax.random.key(0))
    space = mlfs.SubnetSpace(config, heads=(12, 6, 3, 1), mlp=(1536, 736, 352, 176))
    names = {name: space.named(name) for name in ("maxnet", "half", "quarter", "eighth")}
    small = {name: mlfs.slice_subnet(model, subnet) for name, subnet in names.items()}
    flops = {name: count_flops(slice_config(config, subnet), options.length) for name, subnet in names.items()}
    rows = {name: {"subnet": str(names[name]), "flops_share": flops[name] / flops["maxnet"]} for name in names}
    for size in options.batches:
        calls = {name: compile_forward(model, size, options.length) for name, model in small.items()}
        times = time_in_turn(calls, seconds=options.seconds)
        for name, row in rows.items():
            row[f"milliseconds, batch {size}"] = 1000 * float(np.median(times[name]))
            row[f"time_share, batch {size}"] = float(np.median(times[name]) / np.median(times["maxnet"]))
    table = Table(title=f"sliced subnets, {options.length} tokens: shares of the maxnet ({device_name()})")
    table.add_column("subnet")
    for column in ("FLOPs", *(f"time, batch {size}" for size in options.batches)):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        shares = (row["flops_share"], *(row[f"time_share, batch {size}"] for size in options.batches))
        table.add_row(f"{name} ({row['subnet']})", *(f"{share:.2f}" for share in shares))
    Console().print(table)
    times = {f"time, batch {n}": f"time_share, batch {n}" for n in options.batches}
    share_bars(RESULT, rows, {"FLOPs": "flops_share"} | times)
    RESULT.write_text(json.dumps({"device": device_name(), **asdict(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
