"""The latency model and the emulated link."""

import asyncio
import time

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mlfs_jax.errors import ConfigError
from spa_jax.network import LLAMA_7B, Link, Proxy, methods, predict


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"rtt_ms": -1}, "rtt_ms = -1: expected a number of at least 0"),
        ({"bandwidth_mb_s": 0}, "bandwidth_mb_s = 0: expected megabytes"),
        ({"jitter": float("nan")}, "jitter = nan"),
        ({"loss": 1.0}, "loss = 1.0: expected a probability"),
    ],
)
def test_links_that_cannot_be(wrong, expected):
    with pytest.raises(ConfigError, match=expected):
        Link(**wrong)


def test_what_the_model_says_of_llama_7b():
    """At 20 ms and 10 MB/s, the network time of SPA is less than a twentieth of that of LoRA layer by layer."""
    by = {m.name: m for m in methods(LLAMA_7B)}
    assert by["spa"].down <= 1100 and by["spa"].up <= 4.2e3 and by["lora-split"].exchanges == 32
    link = Link(rtt_ms=20, bandwidth_mb_s=10)
    network = {name: predict(m, link, cloud_ms=0, device_ms=0).network for name, m in by.items()}
    assert network["spa"] < network["lst"] < network["lora-split"] / 20
    assert network["lst"] == pytest.approx(20 + (by["lst"].down + by["lst"].up) / 1e4, abs=0.01)
    assert network["adapter-split"] < network["lora-split"]
    whole = predict(by["spa"], link, cloud_ms=30, device_ms=10)
    assert whole.total == pytest.approx(30 + 6.2 + network["spa"])
    raw = methods(LLAMA_7B, coding="fp16", projected=False)[0]
    assert raw.down == pytest.approx(270e3, rel=0.01)


def test_loss_costs_round_trips():
    assert Link(rtt_ms=10, loss=0.5).exchange_ms(0) == pytest.approx(30)


async def echo(connection):
    async for data in connection:
        await connection.send(data)


def through(link=None, target=None, **faults):
    """Run ``body(connection, proxy)`` behind an emulated link to an echo."""

    def run(body):
        async def main():
            async with serve(echo, "127.0.0.1", 0, compression=None) as server:
                port = server.sockets[0].getsockname()[1]
                proxy = Proxy(target or f"ws://127.0.0.1:{port}", link, **faults)
                async with proxy, connect(proxy.url, compression=None, proxy=None) as connection:
                    return await body(connection, proxy)

        return asyncio.run(asyncio.wait_for(main(), 20))

    return run


def test_a_round_trip_takes_its_time_and_order_is_kept():
    async def body(connection, proxy):
        begin = time.perf_counter()
        await connection.send(b"x")
        await connection.recv()
        single = time.perf_counter() - begin
        begin = time.perf_counter()
        for i in range(20):
            await connection.send(bytes([i]) * 1000)
        back = [(await connection.recv())[0] for _ in range(20)]
        return single, time.perf_counter() - begin, back, proxy.traffic

    single, many, back, traffic = through(Link(rtt_ms=40, bandwidth_mb_s=1, jitter=0.2))(body)
    assert back == list(range(20))
    assert single > 0.02 and 0.02 < many < 20 * 0.04 + 5  # 20 at once wait for the line (20 ms); a busy machine is slow
    assert (traffic.frames, traffic.up, traffic.down) == (42, 20001, 20001)


def test_cut_at_a_frame_and_capture():
    async def body(connection, proxy):
        await connection.send(b"one")
        assert await connection.recv() == b"one"
        await connection.send(b"two")
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        async with connect(proxy.url, proxy=None) as again:  # the next connection is whole
            await again.send(b"three")
            assert await again.recv() == b"three"
        return proxy.captured

    captured = through(cut={3}, capture=True)(body)
    assert captured == [("up", b"one"), ("down", b"one"), ("up", b"two"), ("up", b"three"), ("down", b"three")]


def test_stall():
    async def body(connection, proxy):
        await connection.send(b"one")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(connection.recv(), 0.1)

    through(stall=1)(body)


def test_no_server_behind_it():
    async def body(connection, proxy):
        raise AssertionError("connected")

    with pytest.raises(InvalidStatus, match="502"):
        through(target="ws://127.0.0.1:9")(body)
