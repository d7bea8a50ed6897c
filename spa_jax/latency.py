"""Predicted beside measured: the same tokens over the latency model and over an emulated link."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from mlfs_jax.interrupts import run_async
from spa_jax.network import TOKEN_BYTES, Latency, Link, Method, Proxy, Shape, methods, predict, sleep_until


@dataclass(frozen=True)
class Row:
    """One method on one link, ms a token.

    Attributes:
        measured: over the emulated link; what is not device or cloud is network.
    """

    method: str
    link: Link
    predicted: Latency
    measured: Latency

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted.total / self.measured.total - 1

    def to_json(self) -> dict[str, Any]:
        parts = {name: {**asdict(x), "total": x.total} for name, x in vars(self).items() if isinstance(x, Latency)}
        return {"method": self.method, "link": asdict(self.link), **parts, "error": self.error}


def compare(
    ways: Sequence[Method],
    links: Sequence[Link],
    *,
    tokens: int,
    cloud_ms: float,
    device_ms: float,
    advance: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """Every method on every link, ``tokens`` new ones each."""
    rows = []
    for link in links:
        for method in ways:
            advance(f"{method.name}: {link.rtt_ms:g} ms, {link.bandwidth_mb_s:g} MB/s")
            predicted = predict(method, link, cloud_ms=cloud_ms, device_ms=device_ms)
            measured = run_async(measure(method, link, tokens=tokens, cloud_ms=cloud_ms, device_ms=device_ms))
            rows.append(Row(method.name, link, predicted, measured))
    return rows


async def measure(
    method: Method, link: Link, *, tokens: int, cloud_ms: float, device_ms: float, seed: int = 0
) -> Latency:
    """ms a token of ``tokens`` exchanges of frames of a method's sizes over an emulated link.

    Both sides take the time that they are said to take, so that methods that nobody has split over a network (LoRA,
    adapters) are measured like those that are. Usage is met as nearly as whole tokens allow.
    """
    used = [True] * round(method.usage * tokens) + [False] * (tokens - round(method.usage * tokens))
    random.Random(seed).shuffle(used)
    down, up, token = bytes(method.down), bytes(method.up), bytes(TOKEN_BYTES)
    think = lambda ms: sleep_until(time.monotonic() + ms / 1e3)  # noqa: E731

    async def cloud(connection):
        await connection.recv()
        for use in used:
            await think(cloud_ms)
            for _ in range(method.exchanges if use else 0):
                await connection.send(down)
                await connection.recv()
            await connection.send(token)

    options = {"compression": None, "max_size": None, "ping_interval": None}
    async with serve(cloud, "127.0.0.1", 0, **options) as server:
        proxy = Proxy(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", link, seed=seed)
        async with proxy, connect(proxy.url, proxy=None, **options) as device:
            begin = time.monotonic() + link.rtt_ms / 1e3  # until the first token could be here
            await device.send(b"go")
            left = tokens
            while left:
                if len(await device.recv()) == len(token):
                    left -= 1
                    continue
                await think(device_ms / method.exchanges)
                await device.send(up)
            total = 1e3 * (time.monotonic() - begin) / tokens
    spent = sum(used) / tokens * device_ms
    return Latency(spent, cloud_ms, total - spent - cloud_ms)


def constants(model, plugin, *, repeats: int = 10) -> tuple[float, float]:
    """(ms of the cloud's part of a token, ms of the device's part of a gated one), measured here, one session alone."""
    from spa_jax.cloud_model import DecoderCloud
    from spa_jax.device_model import SideDevice

    device = SideDevice(plugin.side, base=plugin.base, setting="s1")
    cloud = DecoderCloud(model, slots=1, context=min(64 + repeats, model.decoder.max_positions), chunk=8)
    cloud.open(0, device.terms())
    cloud_ms, device_ms, state = [], [], device.start()
    for i in range(repeats):
        begin = time.perf_counter()
        read = cloud.step([0], [3])[0]
        middle = time.perf_counter()
        g, state = device.side(state, read.taps, np.array([i]))
        after = time.perf_counter()
        cloud.finish([0], g[None])
        cloud_ms.append(middle - begin + time.perf_counter() - after)
        device_ms.append(after - middle)
    return 1e3 * statistics.median(cloud_ms), 1e3 * statistics.median(device_ms)


async def measure_runtime(cloud_model, device_model, link: Link, prompt: Sequence[int], tokens: int):
    """(ms a token, the :class:`spa_jax.device.Answer`) of cloud and device as they are, over an emulated link.

    From the first token to the last; what is compiled is compiled before.
    """
    from spa_jax.cloud import Cloud, CloudConfig
    from spa_jax.device import Device

    async with Cloud(cloud_model, CloudConfig(port=0, reply_s=60)) as cloud:
        for now in (Link(), link):
            times: list[float] = []
            async with Proxy(cloud.url, now) as proxy, Device(proxy.url, device_model) as device:
                answer = await device.generate(prompt, tokens, on_token=lambda *_: times.append(time.monotonic()))  # noqa: B023
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1), answer


def running(
    model,
    plugin,
    shape: Shape,
    links: Sequence[Link],
    *,
    tokens: int,
    cloud_ms: float,
    device_ms: float,
    coding: str = "int8",
    prompt: Sequence[int] = (3, 4, 5, 6),
) -> list[Row]:
    """SPA and LST as rows of :func:`compare`, of the runtime itself; the usage is what the gate made of it."""
    from spa_jax.cloud_model import DecoderCloud
    from spa_jax.device_model import SideDevice

    rows, side = [], plugin.side
    cloud = DecoderCloud(model, slots=1, context=len(prompt) + tokens, chunk=8)
    for name, threshold in (("spa", plugin.threshold), ("lst", 0.0)):
        setting = plugin.setting if plugin.setting.gated else "s1"
        device = SideDevice(side, base=plugin.base, setting=setting, threshold=threshold, coding=coding)
        for link in links:
            ms, answer = run_async(measure_runtime(cloud, device, link, prompt, tokens))
            usage = sum(answer.used[1:]) / (len(answer.used) - 1)
            spa = methods(shape, coding=coding, projected=False, usage=usage, memory=side.config.memory)[0]
            predicted = predict(spa, link, cloud_ms=cloud_ms, device_ms=device_ms)
            measured = Latency(usage * device_ms, cloud_ms, ms - usage * device_ms - cloud_ms)
            rows.append(Row(f"{name}, running", link, predicted, measured))
    return rows


def plot_budget(points: Sequence[tuple[float, float]], chosen: tuple[float, float], link: Link, file: Path) -> Path:
    """Held-out loss against ms a token, over all usages; ``chosen`` is the plugin's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4))
    axes.plot(*zip(*sorted(points), strict=True), marker=".", color="#4c72b0")
    axes.plot(*chosen, marker="o", color="#c44e52", linestyle="", label="this budget")
    axes.set(
        xlabel=f"ms a token at {link.rtt_ms:g} ms, {link.bandwidth_mb_s:g} MB/s", ylabel="held-out loss, nats a token"
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def plot(rows: Sequence[Row], file: Path) -> Path:
    """Bars of the whole time of a token, one panel a link: predicted on the left of each pair, measured on the right.

    On a logarithmic axis, the same in all panels: ways are up to a hundred times apart. Hence wholes, and no parts.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    links = list(dict.fromkeys(row.link for row in rows))
    wide = min(3, len(links))
    high = -(-len(links) // wide)
    size = (max(6.0, 3.6 * wide), 0.5 + 2.8 * high)
    figure, grid = plt.subplots(high, wide, figsize=size, squeeze=False, sharey=True, layout="constrained")
    panels = grid.ravel()[: len(links)]
    for empty in grid.ravel()[len(links) :]:
        empty.set_axis_off()
    totals = [total for row in rows for total in (row.predicted.total, row.measured.total)]
    for panel, link in zip(panels, links, strict=True):
        here = [row for row in rows if row.link == link]
        for side, name, colour in ((-0.2, "predicted", "#a1b8d6"), (0.2, "measured", "#4c72b0")):
            heights = [getattr(row, name).total for row in here]
            label = name if panel is panels[0] else None
            bars = panel.bar(np.arange(len(here)) + side, heights, 0.38, color=colour, label=label)
            if name == "measured":
                panel.bar_label(bars, fmt="{:.0f}", fontsize=7, padding=1)
        panel.set_xticks(range(len(here)), [row.method for row in here], rotation=25, ha="right", fontsize=8)
        panel.set_title(f"{link.rtt_ms:g} ms, {link.bandwidth_mb_s:g} MB/s", fontsize=10)
        panel.set_yscale("log")
        panel.set_ylim(min(totals) / 2, 2.5 * max(totals))  # room for the figures above the bars
    for first in grid[:, 0]:
        first.set_ylabel("ms a token")
    figure.legend(loc="outside upper center", ncol=2, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
