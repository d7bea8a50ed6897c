"""64 devices, each with a plugin of its own, on one cloud: is every text its solo run's, and how long do steps take?

    python experiments/bench_cloud.py                         # a random model of 4 layers; a minute on 2 cores
    python experiments/bench_cloud.py --model smollm2-135m    # the real one

The cloud runs here; the devices, coroutines of one other process, connect over loopback. Plugins are random and so is
what they say; times do not depend on it. Written to results/bench_cloud.json: step times, times between the tokens of a
session, batch fill, bytes, memory.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

import mlfs_jax as mlfs
from mlfs_jax.config import DecoderConfig, Rope
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.generate import GenerateConfig
from mlfs_jax.model import Model, init_model
from mlfs_jax.timing import device_name
from spa_jax.cloud import Cloud, CloudConfig
from spa_jax.cloud_model import DecoderCloud
from spa_jax.decode import generate
from spa_jax.device import Device, DeviceConfig
from spa_jax.device_model import SideDevice
from spa_jax.side import Side, SideConfig
from spa_jax.start import init_side

RESULT = Path(__file__).parent / "results" / "bench_cloud.json"
SMALL = DecoderConfig("llama", 512, 128, 4, 4, 4, 32, 256, max_positions=512, rope=Rope(10000.0, 32))


@dataclass(frozen=True)
class Options:
    """What is served to how many.

    Attributes:
        model: a base by name; None: a small random one.
        slots: sessions at a time; the others wait for one.
        check: how many texts are compared with their solo runs.
    """

    model: str | None = None
    devices: int = 64
    slots: int = 64
    tokens: int = 30
    prompt: int = 16
    context: int = 96
    check: int = 64
    coding: str = "fp32"


def load(options: Options) -> Model:
    return init_model(SMALL, jax.random.key(0)) if options.model is None else mlfs.from_pretrained(options.model)


def plugin_of(config: DecoderConfig, i: int) -> Side:
    """A random plugin that says something: its Up and its gate are not zero."""
    side, rng = init_side(jax.random.key(i), config, SideConfig()), np.random.default_rng(i)
    up = 0.3 * rng.normal(size=side.net["up.kernel"].shape).astype(np.float32)
    gate = {name: 0.1 * rng.normal(size=x.shape).astype(np.float32) for name, x in side.gate.items()}
    return side.replace(net=side.net | {"up.kernel": jax.numpy.asarray(up)}, gate=gate)


def prompt_of(config: DecoderConfig, options: Options, i: int) -> list[int]:
    return np.random.default_rng(1000 + i).integers(3, config.vocab_size, options.prompt).tolist()


def devices(url: str, options: Options, config: DecoderConfig, base: str, results) -> None:
    """The other process: all devices; gives their texts and the times between their tokens."""

    async def one(i: int, model: SideDevice):
        times = []
        patience = DeviceConfig(reply_s=120, answer_s=1800, connect_s=60)
        async with Device(url, model, config=patience) as device:
            answer = await device.generate(
                prompt_of(config, options, i), options.tokens, on_token=lambda *_: times.append(time.perf_counter())
            )
        return answer.tokens, answer.used, np.diff(times).tolist(), asdict(answer.stats)

    async def main():
        sides = [SideDevice(plugin_of(config, i), base=base, coding=options.coding) for i in range(options.devices)]
        for width in (1, 2, 4, 8, 16, 32, 64):
            sides[0].warm_up(width)
        return await asyncio.gather(*(one(i, side) for i, side in enumerate(sides)))

    results.put(asyncio.run(main()))


def quantiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99, "p99_over_p50": p99 / p50}


def main(options: Options) -> None:
    base = load(options)
    fingerprint = base_fingerprint(base.config, base.base)
    model = DecoderCloud(base, slots=options.slots, context=options.context)
    model.warm_up()
    steps, step = [], model.step

    def timed(slots, tokens):
        begin = time.perf_counter()
        result = step(slots, tokens)
        steps.append(time.perf_counter() - begin)
        return result

    model.step = timed

    async def serve():
        config = CloudConfig(port=0, reply_s=120, queue_s=1800, hello_s=60)
        async with Cloud(model, config) as cloud:
            context = multiprocessing.get_context("spawn")
            results = context.Queue()
            process = context.Process(target=devices, args=(cloud.url, options, base.config, fingerprint, results))
            process.start()
            answers = await asyncio.to_thread(results.get)
            process.join()
            metrics = cloud.metrics
            fill = metrics.get("batch_fill_total") / max(metrics.get("steps_total"), 1)
            bytes_ = {way: metrics.get("bytes_total", direction=way) for way in ("up", "down")}
            return answers, fill, bytes_

    begin = time.time()
    answers, fill, bytes_ = asyncio.run(serve())
    seconds = time.time() - begin
    wrong = []
    for i in range(min(options.check, options.devices)):
        config = GenerateConfig(max_new_tokens=options.tokens, stop_tokens=())
        solo = generate(base, plugin_of(base.config, i), [prompt_of(base.config, options, i)], config)
        if solo.tokens[0] != answers[i][0]:
            wrong.append(i)
    used = np.concatenate([used for _, used, _, _ in answers])
    result = {
        **asdict(options),
        "cpu": device_name(),
        "texts_checked": min(options.check, options.devices),
        "texts_unlike_their_solo_run": wrong,
        "seconds": seconds,
        "usage": float(used.mean()),
        "step": quantiles(steps),
        "token_interval": quantiles([t for _, _, times, _ in answers for t in times]),
        "batch_fill": fill,
        "bytes": bytes_,
        "memory_bytes": model.memory,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
