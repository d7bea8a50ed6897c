"""Training steps and decoding on an accelerator: tokens a second, and how much of the hardware that is.

    python experiments/bench_gpu.py                       # SmolLM2-135M's and Llama-3.2-1B's shapes, bfloat16, an H200
    python experiments/bench_gpu.py --shapes tiny --batches 2 --length 16 --steps 2     # does it run? (any machine)

Random weights: time does not depend on them. MFU counts the FLOPs that the mathematics asks for: of the layers' matrix
products and of the head, once forwards and once backwards to the inputs (a frozen base has no other gradient), and of
the adapters nothing; what is computed again does not count. Decoding is set beside the time that reading all weights
and the cache takes. ``--attention cudnn`` takes cuDNN's fused kernel; ``--trace DIR`` writes a profile of the LoRA
step.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from pictures import bars
from rich.console import Console
from rich.table import Table

import mlfs_jax as mlfs
import spa_jax as spa
from mlfs_jax.backbone.cache import init_cache
from mlfs_jax.config import DecoderConfig, Rope
from mlfs_jax.model import forward
from mlfs_jax.published import config_of
from mlfs_jax.subnet import num_flops, num_params
from mlfs_jax.supernet import Supernet
from mlfs_jax.timing import device_name
from spa_jax.seam import Setting
from spa_jax.start import init_side
from spa_jax.train import SideTrainer

RESULT = Path(__file__).parent / "results" / "bench_gpu.json"
SHAPES: dict[str, Callable[[], DecoderConfig]] = {
    "smollm2-135m": lambda: DecoderConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, rope=Rope(1e5, 64)),
    "llama-3.2-1b": lambda: config_of("llama-3.2-1b"),
    "tiny": lambda: DecoderConfig("llama", 300, 48, 3, 4, 2, 12, 96, 128, rope=Rope(1e4, 12)),
}


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        batches: the largest that fits counts; one measurement each.
        peak_tflops, bandwidth_tb_s: of the device in bfloat16 (an H200 SXM: 989 and 4.8).
        remat: recompute activations.
        trace: folder for a profile of the first LoRA step.
    """

    shapes: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b")
    batches: tuple[int, ...] = (8, 32)
    length: int = 1024
    decode_batches: tuple[int, ...] = (1, 32)
    context: int = 1024
    steps: int = 10
    dtype: str = "bfloat16"
    remat: bool = False
    attention: Literal["xla", "cudnn"] = "xla"
    peak_tflops: float = 989.0
    bandwidth_tb_s: float = 4.8
    trace: Path | None = None


def timed(step: Callable[[], object], steps: int) -> float:
    """Median seconds of a step, after two that compile and warm up."""
    seconds = []
    for i in range(steps + 2):
        begin = time.perf_counter()
        jax.block_until_ready(step())
        if i >= 2:
            seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def training(model: mlfs.Model, batch_size: int, options: Options, trace: bool) -> dict[str, dict]:
    """Seconds, tokens a second and MFU of a step of LoRA, of the sandwich, and of a side network."""
    config, length = model.config, options.length
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch_size, length), dtype=np.int32)
    ones = np.ones_like(tokens)
    batch = {"input_ids": tokens, "attention_mask": ones, "loss_mask": ones.astype(np.float32)}
    batch = jax.device_put(batch)
    space = mlfs.SubnetSpace.from_ratios(config, width=(1.0, 0.5, 0.25))
    supernet = Supernet(config, mlfs.DistillConfig(beta=0.0), optax.adam(1e-4), remat=options.remat)
    state = supernet.init({"lora": mlfs.init_lora(jax.random.key(0), model)})
    head = 2 * length * config.embed * config.vocab_size
    flops = lambda net: batch_size * 2 * (num_flops(config, net, length=length) + head)  # noqa: E731

    def supernet_step(subnets):
        def step():
            nonlocal state
            state, losses = supernet.step(state, model.base, batch, subnets, 0.0)
            return losses

        return step

    side = init_side(jax.random.key(1), config, spa.SideConfig())
    trainer = SideTrainer(model.graphdef, side, Setting.S1, optax.adam(1e-4))
    side_state = jax.device_put(supernet.init(side.net))

    def side_step():
        nonlocal side_state
        side_state, loss = trainer.step(side_state, model.base, batch, None, jax.random.key(0))
        return loss

    whole, half = flops(space.maxnet), flops(space.minnet)
    sides = {
        "LoRA": (supernet_step(()), whole),
        "sandwich, maxnet and minnet": (supernet_step((space.minnet,)), whole + half),
        "SPA, side network": (side_step, whole / 2),  # the base forwards only; the side network's own is not counted
    }
    rows = {}
    for name, (step, count) in sides.items():
        seconds = timed(step, options.steps)
        mfu = count / seconds / options.peak_tflops / 1e12
        rows[name] = {"seconds": seconds, "tokens_per_second": batch_size * length / seconds, "mfu": mfu}
    if trace and options.trace is not None:
        with jax.profiler.trace(str(options.trace)):
            jax.block_until_ready(sides["LoRA"][0]())
    return rows


def decoding(model: mlfs.Model, batch_size: int, options: Options) -> dict[str, float]:
    """One token more for each of ``batch_size`` texts of ``context`` tokens, beside the time of reading it all."""
    config, dtype = model.config, jnp.dtype(options.dtype)
    cache = init_cache(config, batch_size, options.context, dtype)
    batch = {"input_ids": jnp.ones((batch_size, 1), jnp.int32)}
    step = jax.jit(partial(forward, model.graphdef)).lower(model.base, batch, cache=cache).compile()
    seconds = timed(lambda: step(model.base, batch, cache=cache).logits, options.steps)
    read = dtype.itemsize * num_params(config, embeddings=True) + cache.k.nbytes + cache.v.nbytes
    bound = read / options.bandwidth_tb_s / 1e12
    return {"seconds": seconds, "tokens_per_second": batch_size / seconds, "of_bandwidth_bound": bound / seconds}


def main(options: Options) -> None:
    os.environ["MLFS_ATTENTION"] = options.attention
    table, results = Table(title=f"{device_name()}, {options.dtype}, length {options.length}"), {}
    for column in ("shape", "what", "batch", "ms", "tokens/s", "of the bound"):
        table.add_column(column, justify="left" if column in ("shape", "what") else "right")
    for name in options.shapes:
        config = SHAPES[name]()
        model = mlfs.init_model(config, jax.random.key(0)).astype(options.dtype)
        found = results.setdefault(name, {})
        for size in options.batches:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # out of memory: a larger batch is left out
                for what, row in training(model, size, options, size == options.batches[0]).items():
                    found[f"{what}, batch {size}"] = row
                    table.add_row(name, what, str(size), *_cells(row, row["mfu"]))
        for size in options.decode_batches:
            row = found[f"decoding, batch {size}"] = decoding(model, size, options)
            table.add_row(name, "decoding", str(size), *_cells(row, row["of_bandwidth_bound"]))
    Console().print(table)
    bound = {
        shape: {what: row.get("mfu", row.get("of_bandwidth_bound")) for what, row in found.items()}
        for shape, found in results.items()
    }
    bars(RESULT, bound, "MFU; decoding: of the bandwidth bound", device_name())
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    RESULT.write_text(json.dumps({"device": device_name(), "options": shown, "results": results}, indent=1))


def _cells(row: dict[str, float], share: float) -> tuple[str, str, str]:
    return f"{1000 * row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{100 * share:.1f} %"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
