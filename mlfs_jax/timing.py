"""What a model costs: FLOPs as the compiler counts them, wall time on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from mlfs_jax.backbone.cache import init_cache
from mlfs_jax.model import Model, forward

LEAST_ROUNDS, MOST_ROUNDS = 5, 50


def compile_forward(model: Model, size: int, length: int) -> tuple[Callable[[], object], float]:
    """A call that runs the model once on ``size`` full sequences, and the FLOPs of that.

    The layers are unrolled: the compiler counts the body of a scan once, and unrolled is how a deployment would run.
    """
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(size, length), dtype=np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if getattr(model.config, "type_vocab", 0):
        batch["token_type_ids"] = np.zeros_like(ids)
    batch = jax.device_put(batch)
    lowered = forward.lower(model.graphdef, model.base, batch, unroll=True)
    compiled = lowered.compile()
    cost = compiled.cost_analysis() or lowered.cost_analysis()  # not every backend counts what it compiled
    flops = cost["flops"]
    return lambda: jax.block_until_ready(compiled(model.base, batch).logits), flops


def compile_decode(model: Model, size: int, length: int) -> Callable[[], object]:
    """A call that makes the logits of one more token for each of ``size`` texts, in a cache of ``length`` slots.

    All slots are attended to, so that is the cost of the last token of a text of that length.
    """
    cache = init_cache(model.config, size, length)
    batch = jax.device_put({"input_ids": np.ones((size, 1), np.int32)})
    compiled = forward.lower(model.graphdef, model.base, batch, cache=cache, unroll=True).compile()
    return lambda: jax.block_until_ready(compiled(model.base, batch, cache=cache).logits)


def time_in_turn(calls: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, list[float]]:
    """Seconds that each call takes, round after round; every round runs all of them, in a new order.

    So a drift of the machine (heat, other work) hits all of them alike. 5 to 50 rounds, as ``seconds`` allows.
    """
    for call in calls.values():  # not counted: the first run allocates
        call()
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in rng.permutation(list(calls)):
            before = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - before)
    return times


def device_name() -> str:
    """``"NVIDIA H200"``, ``"TPU v5 lite"``, or the CPU's name and how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {cores} cores"
