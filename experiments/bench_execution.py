"""Masked or sliced? What a subnet's gradient costs either way, at the shapes of MiniLM-L6.

    python experiments/bench_execution.py          # two minutes on 2 cores, most of it compilation

Both sides run in turn in one process; the figures are CPU-seconds (all threads), the median over rounds, and what they
are of one maxnet gradient. Random weights: time does not depend on them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from pictures import share_bars
from rich.console import Console
from rich.table import Table

import mlfs_jax as mlfs
from mlfs_jax.distill import init_projection
from mlfs_jax.subnet import num_flops
from mlfs_jax.supernet import Supernet, widths_of

RESULT = Path(__file__).parent / "results" / "bench_execution.json"


@dataclass(frozen=True)
class Options:
    """Sizes of the batch, and how often each side runs."""

    batch: int = 16
    length: int = 64
    rounds: int = 7


def main(options: Options) -> None:
    shape = {"vocab_size": 1000, "embed": 384, "layers": 6, "heads": 12, "head_dim": 32, "mlp": 1536}
    config = mlfs.EncoderConfig("bert", **shape, max_positions=options.length, head="sequence", labels=11)
    model, space = mlfs.init_model(config, jax.random.key(0)), mlfs.SubnetSpace.from_ratios(config)
    tokens = jnp.ones((options.batch, options.length), jnp.int32)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens[:, 0]}
    distill = mlfs.DistillConfig()
    supernet = Supernet(config, distill, optax.adam(1e-3), unroll=jax.default_backend() == "cpu")
    params = {
        "lora": mlfs.init_lora(jax.random.key(1), model, full=("head",)),
        "features": init_projection(jax.random.key(2), config.embed, distill),
    }
    maxnet_grads, add_subnet_grads, _ = supernet._compiled
    total, _, teacher = maxnet_grads(params, model.base, batch, 1.0, True)

    def subnet_side(subnet: mlfs.Subnet, sliced: bool):
        mask, widths = mlfs.make_mask(config, subnet), widths_of(config, subnet) if sliced else None

        def run():
            nonlocal total  # donated, so handed on
            total, loss = add_subnet_grads(total, params, model.base, batch, teacher, mask, 1.0, widths)
            return loss

        return run

    sides = {"maxnet": lambda: maxnet_grads(params, model.base, batch, 1.0, True)[1]}
    for name, subnet in space.names().items():
        if name != "maxnet":
            sides |= {f"{name} masked": subnet_side(subnet, False), f"{name} sliced": subnet_side(subnet, True)}

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(options.rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            jax.block_until_ready(side())
            if round_:  # the first is compilation
                seconds[name].append(time.process_time() - start)

    whole = float(np.median(seconds["maxnet"]))
    rows = {
        name: {"cpu_seconds": float(np.median(s)), "of_maxnet": float(np.median(s)) / whole}
        for name, s in seconds.items()
    }
    table = Table(
        title=f"gradient of one subnet, batch {options.batch} x {options.length} (median of {options.rounds})"
    )
    for column in ("subnet", "FLOPs of the maxnet's", "CPU-s", "of the maxnet's"):
        table.add_column(column, justify="left" if column == "subnet" else "right")
    for name, row in rows.items():
        share = num_flops(config, space.named(name.split()[0]), length=options.length) / num_flops(
            config, length=options.length
        )
        row["flops_share"] = share
        table.add_row(name, f"{share:.2f}", f"{row['cpu_seconds']:.3f}", f"{row['of_maxnet']:.2f}")
    Console().print(table)
    share_bars(RESULT, rows, {"FLOPs": "flops_share", "CPU-seconds": "of_maxnet"})
    RESULT.write_text(json.dumps({"device": jax.devices()[0].device_kind, **vars(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    mlfs.keep_freed_memory()  # as `mlfs fit` does
    main(tyro.cli(Options, description=__doc__))
