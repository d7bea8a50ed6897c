"""What a model costs: FLOPs as the compiler counts them, wall time on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mlfs_jax.backbone.cache import init_cache
from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.model import Model, abstract, forward

LEAST_ROUNDS, MOST_ROUNDS = 5, 50


UNROLLED = 12
"""Layers up to which programs are unrolled, as a deployment would: a deeper scan takes minutes to compile so."""


def compile_forward(model: Model, size: int, length: int) -> Callable[[], object]:
    """A call that runs the model once on ``size`` full sequences."""
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(size, length), dtype=np.int32)
    ones = {"attention_mask": np.ones_like(ids)}
    batch = jax.device_put(_inputs(model.config, ids) | ones)
    unroll = model.config.layers <= UNROLLED
    compiled = jax.jit(partial(forward, model.graphdef, unroll=unroll)).lower(model.base, batch).compile()
    return lambda: jax.block_until_ready(compiled(model.base, batch).logits)


def count_flops(config: Config, length: int) -> int:
    """FLOPs of one sequence through a network of this shape, as the compiler counts them (2 per multiply-add).

    The compiler counts the body of a scan once, so one and two layers are compiled, without weights, and the
    difference is a layer.
    """

    def flops(layers: int) -> float:
        cut = {"windows": config.windows[:layers]} if isinstance(config, DecoderConfig) and config.windows else {}
        graphdef, base = abstract(config.replace(layers=layers, **cut))
        ids = jax.ShapeDtypeStruct((1, length), np.int32)
        lowered = jax.jit(partial(forward, graphdef, unroll=True)).lower(base, _inputs(config, ids))
        cost = lowered.compile().cost_analysis() or lowered.cost_analysis()  # not every backend counts what it compiled
        return cost["flops"]

    one = flops(1)
    return round(one if config.layers == 1 else one + (config.layers - 1) * (flops(2) - one))


def _inputs(config: Config, ids) -> dict:
    """A batch of full sequences."""
    types = {"token_type_ids": np.zeros(ids.shape, ids.dtype)} if getattr(config, "type_vocab", 0) else {}
    return {"input_ids": ids, "attention_mask": ids, **types}


def compile_decode(model: Model, size: int, length: int) -> Callable[[], object]:
    """A call that makes the logits of one more token for each of ``size`` texts, in a cache of ``length`` slots.

    All slots are attended to, so that is the cost of the last token of a text of that length.
    """
    cache, unroll = init_cache(model.decoder, size, length), model.config.layers <= UNROLLED
    batch = jax.device_put({"input_ids": np.ones((size, 1), np.int32)})
    step = jax.jit(partial(forward, model.graphdef, unroll=unroll))
    compiled = step.lower(model.base, batch, cache=cache).compile()
    return lambda: jax.block_until_ready(compiled(model.base, batch, cache=cache).logits)


def time_in_turn(calls: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, list[float]]:
    """Seconds that each call takes, round after round; every round runs all of them, in a new order.

    So a drift of the machine (heat, other work) hits all of them alike. A call runs twice and the second counts: on the
    device that it is for, no other model has just taken the caches from it. 5 to 50 rounds, as ``seconds`` allows.
    """
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in rng.permutation(list(calls)):
            calls[name]()
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
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"
