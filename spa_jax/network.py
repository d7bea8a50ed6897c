"""What a network between cloud and device costs: a model of it, and a link that behaves like one.

The model (SPA, arXiv 2403.07088, equations 4-6), for each new token,

    T_total = T_device + T_cloud + T_net,    T_net = M (tau + T_data),    T_device = F_data C / f_e

with M exchanges a token, tau the round trip, T_data = bytes / bandwidth. [ours] The gate's usage u multiplies what only
a gated token costs; C / f_e, cycles per byte over the device's frequency, is measured as a whole: ms per exchange.

:class:`Proxy` stands between two websocket endpoints on one machine and delays, jitters, loses, cuts and stalls.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from mlfs_jax.errors import ConfigError
from spa_jax.wire import SideState, Taps, Token, encode


@dataclass(frozen=True)
class Link:
    """A network link, the same in both directions.

    Attributes:
        rtt_ms: from a byte's departure to the arrival of the answer to it, for an answer that takes no time.
        bandwidth_mb_s: megabytes (10^6) a second each way; frames queue for it.
        jitter: standard deviation of a frame's delay, as a share of the round trip; delays never shrink below zero
            and frames never overtake.
        loss: probability that a frame is lost once; TCP notices and repeats it, one round trip later.
    """

    rtt_ms: float = 0.0
    bandwidth_mb_s: float = float("inf")
    jitter: float = 0.0
    loss: float = 0.0

    def __post_init__(self):
        for field in ("rtt_ms", "jitter"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} = {getattr(self, field)}: expected a number of at least 0.")
        if not self.bandwidth_mb_s > 0:
            raise ConfigError(f"bandwidth_mb_s = {self.bandwidth_mb_s}: expected megabytes a second, more than 0.")
        if not 0 <= self.loss < 1:
            raise ConfigError(f"loss = {self.loss}: expected a probability of at least 0 and below 1.")

    def exchange_ms(self, size: float) -> float:
        """Expected ms of one exchange: a round trip, ``size`` bytes in both directions together, what loss adds."""
        again = 2 * self.loss / (1 - self.loss)  # either of two frames, any number of times
        return self.rtt_ms * (1 + again) + size / self.bandwidth_mb_s / 1e3


# --------------------------------------------------------------------------------------------- the latency model
@dataclass(frozen=True)
class Shape:
    """What of a model and its adapter the bytes on a link depend on.

    Attributes:
        embed: D.
        layers: adapted layers, each of which is an exchange when LoRA or adapters live on the device.
        taps: activations a position, n + 1.
        width: d, what a projected activation has.
        attention: channels that LoRA adds to: of queries and values together.
    """

    embed: int
    layers: int
    taps: int
    width: int
    attention: int


LLAMA_7B = Shape(embed=4096, layers=32, taps=33, width=32, attention=2 * 4096)
"""With the plugin as released: every layer tapped, 32 channels wide."""


@dataclass(frozen=True)
class Method:
    """A way to adapt a model across a link.

    Attributes:
        exchanges: M, of each token that needs any.
        down, up: bytes of the frames of one exchange.
        usage: share of the tokens that need any.
    """

    name: str
    exchanges: int
    down: int
    up: int
    usage: float = 1.0


@dataclass(frozen=True)
class Latency:
    """Expected ms a token, by part."""

    device: float
    cloud: float
    network: float

    @property
    def total(self) -> float:
        return self.device + self.cloud + self.network


def methods(
    shape: Shape, *, coding: str = "int8", projected: bool = True, usage: float = 0.62, memory: str = "stateless"
) -> list[Method]:
    """SPA and what it is compared with, their frames encoded as they would travel.

    LST is SPA without a gate. LoRA and adapters on the device see the input of each adapted layer and answer with what
    they add there. ``usage``: 0.62 is the paper's (table 6). With "lazy" memory the positions that the gate left out
    go down with the next one.
    """
    width, up = shape.width if projected else shape.embed, _up(shape.embed, coding)
    each, wide = _down(shape.taps, width, coding), _down(1, shape.embed, coding)
    together = round(each / usage) if memory == "lazy" and usage else each
    return [
        Method("spa", 1, together, up, usage=usage),
        Method("lst", 1, each, up),
        Method("lora-split", shape.layers, wide, _up(shape.attention, coding)),
        Method("adapter-split", shape.layers, wide, _up(shape.embed, coding)),
    ]


def _down(taps: int, width: int, coding: str) -> int:
    return len(encode(Taps(np.array([1000]), True, np.ones((taps, 1, width), np.float32), None), coding))


def _up(width: int, coding: str) -> int:
    return len(encode(SideState(1000, np.ones(width, np.float32)), coding))


TOKEN_BYTES = len(encode(Token(30000, "more")))


def predict(method: Method, link: Link, *, cloud_ms: float, device_ms: float) -> Latency:
    """Expected time of a token.

    Args:
        cloud_ms: of the cloud's part of a token.
        device_ms: of the device's part of a token that needs it, all of its exchanges together.
    """
    exchange = link.exchange_ms(method.down + method.up)
    token = TOKEN_BYTES / link.bandwidth_mb_s / 1e3  # streams down: takes part of the line, no round trip
    return Latency(method.usage * device_ms, cloud_ms, method.usage * method.exchanges * exchange + token)


# ------------------------------------------------------------------------------------------------------ the link
@dataclass
class Traffic:
    """What went through a proxy, both ways; bytes of websocket messages."""

    frames: int = 0
    up: int = 0
    down: int = 0


class Proxy:
    """An emulated link to a websocket server on this machine; an asynchronous context manager.

    Attributes:
        url: where the device connects to instead.
        traffic: what went through so far.
        captured: every message, as ("up" or "down", bytes), when it was asked to keep them.
    """

    def __init__(
        self,
        target: str,
        link: Link | None = None,
        *,
        cut: Collection[int] = (),
        stall: int | None = None,
        capture: bool = False,
        seed: int = 0,
    ):
        """
        Args:
            target: URL of the server.
            cut: numbers of messages, counted from 0 over both directions and all connections, that are not delivered:
                there both ends see their connection break.
            stall: from this message on nothing is delivered, and nobody is told.
        """
        self.target, self.link = target, link or Link()
        self.cut, self.stall, self.capture = set(cut), stall, capture
        self.traffic = Traffic()
        self.captured: list[tuple[str, bytes]] = []
        self._far: dict[ServerConnection, ClientConnection] = {}
        self._random = random.Random(seed)
        self._pairs: set[tuple[ServerConnection, ClientConnection]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._dial,
            max_size=None,
            compression=None,
            ping_interval=None,
        )
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_) -> None:
        self.break_now()
        self._server.close()
        await self._server.wait_closed()

    def break_now(self) -> None:
        """Cut every connection."""
        for pair in list(self._pairs):
            _abort(*pair)

    async def _dial(self, near: ServerConnection, request):
        """Connect to the server first, so that its refusal is the proxy's."""
        await asyncio.sleep(self.link.rtt_ms / 1e3)
        headers = {"Authorization": value} if (value := request.headers.get("Authorization")) else {}
        try:
            self._far[near] = await connect(
                self.target + request.path,
                additional_headers=headers,
                max_size=None,
                compression=None,
                ping_interval=None,
                proxy=None,
            )
        except InvalidHandshake as error:
            refused = getattr(error, "response", None)
            if refused is None:
                return near.respond(502, f"{error}\n")
            return near.respond(refused.status_code, (refused.body or b"").decode())
        except OSError as error:
            return near.respond(502, f"the server cannot be reached: {error}\n")

    async def _handle(self, near: ServerConnection) -> None:
        far = self._far.pop(near)
        pair = near, far
        self._pairs.add(pair)
        pumps = [
            asyncio.create_task(self._pump(near, far, "up")),
            asyncio.create_task(self._pump(far, near, "down")),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self.stall is not None and self.traffic.frames > self.stall:
                await near.wait_closed()
        finally:
            self._pairs.discard(pair)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            _abort(far)

    async def _pump(self, source, sink, way: str) -> None:
        """Hand on messages in order, each when it would have arrived; then the way the connection was closed."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        deliver = asyncio.create_task(self._deliver(queue, source, sink))
        free = last = loop.time()
        try:
            async for data in source:
                number, self.traffic.frames = self.traffic.frames, self.traffic.frames + 1
                if number in self.cut:
                    _abort(source, sink)
                    break
                if self.stall is not None and number >= self.stall:
                    continue
                setattr(self.traffic, way, getattr(self.traffic, way) + len(data))
                if self.capture:
                    self.captured.append((way, data))
                free = max(free, loop.time()) + len(data) / self.link.bandwidth_mb_s / 1e6
                last = max(last, free + self._delay())
                queue.put_nowait((last, data))
        except ConnectionClosed:
            pass
        finally:
            queue.put_nowait((last, None))
            await deliver

    def _delay(self) -> float:
        """Seconds that one frame is on its way."""
        rtt = self.link.rtt_ms / 1e3
        delay = max(0.0, rtt / 2 + self._random.gauss(0, self.link.jitter * rtt))
        while self.link.loss and self._random.random() < self.link.loss:
            delay += rtt
        return delay

    async def _deliver(self, queue: asyncio.Queue, source, sink) -> None:
        try:
            while True:
                at, data = await queue.get()
                await sleep_until(at)
                if data is None:
                    code = source.close_code
                    if code is None or code in (1005, 1006, 1015):
                        _abort(sink)
                    else:
                        await sink.close(code, source.close_reason or "")
                    return
                await sink.send(data)
        except ConnectionClosed:
            pass


async def sleep_until(at: float) -> None:
    """The event loop's timers are a millisecond coarse; the last of it is spent turning."""
    loop = asyncio.get_running_loop()
    if (left := at - loop.time()) > 0.001:
        await asyncio.sleep(left - 0.001)
    while loop.time() < at:
        await asyncio.sleep(0)


def _abort(*connections) -> None:
    for connection in connections:
        connection.transport.abort()
