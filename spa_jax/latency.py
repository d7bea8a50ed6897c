"""Predicted beside measured: the same tokens over the latency model and over an emulated link."""

from __future__ import annotations

import asyncio
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

from spa_jax.network import TOKEN_BYTES, Latency, Link, Method, Proxy, predict, sleep_until

PARTS = ("device", "cloud", "network")


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
    methods: Sequence[Method],
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
        for method in methods:
            advance(f"{method.name}: {link.rtt_ms:g} ms, {link.bandwidth_mb_s:g} MB/s")
            costs = {"cloud_ms": cloud_ms, "device_ms": device_ms}
            measured = asyncio.run(measure(method, link, tokens=tokens, **costs))
            rows.append(Row(method.name, link, predict(method, link, **costs), measured))
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
    cloud = DecoderCloud(model, slots=1, context=64 + repeats, chunk=8)
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


def plot(rows: Sequence[Row], file: Path) -> Path:
    """Stacked bars, one panel a link: predicted on the left of each pair, measured on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    links = list(dict.fromkeys(row.link for row in rows))
    figure, panels = plt.subplots(1, len(links), figsize=(3.6 * len(links), 3.4), squeeze=False)
    colours = dict(zip(PARTS, ("#4c72b0", "#55a868", "#c44e52"), strict=True))
    for panel, link in zip(panels[0], links, strict=True):
        here = [row for row in rows if row.link == link]
        for side, name, shade in ((-0.2, "predicted", 0.55), (0.2, "measured", 1.0)):
            bottom = np.zeros(len(here))
            for part in PARTS:
                height = np.array([max(getattr(getattr(row, name), part), 0) for row in here])
                label = f"{part}, {name}" if panel is panels[0][0] else None
                panel.bar(
                    np.arange(len(here)) + side, height, 0.38, bottom, color=colours[part], alpha=shade, label=label
                )
                bottom += height
        panel.set_xticks(range(len(here)), [row.method for row in here], rotation=25, ha="right")
        panel.set_title(f"{link.rtt_ms:g} ms, {link.bandwidth_mb_s:g} MB/s", fontsize=10)
        panel.set_yscale("symlog", linthresh=10)
    panels[0][0].set_ylabel("ms a token")
    figure.legend(loc="upper center", ncol=6, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file
