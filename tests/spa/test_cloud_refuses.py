"""Who may come in, and what neither side takes from the other; each is told why. Fake models, real sockets."""

import asyncio
import logging
import re

import msgpack
import numpy as np
import pytest
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from mlfs_jax.errors import ConfigError
from spa_jax.cloud import Cloud, CloudConfig
from spa_jax.device import Device
from spa_jax.errors import NetworkError
from spa_jax.wire import Error, Resume, SideState, Step, Taps, Token, Welcome, decode, encode
from tests.spa.fake_models import D, FakeCloud, FakeDevice, hello, solo
from tests.spa.runtime import PROMPT, TOKEN, Liar, device, released, run, serving, write


@pytest.mark.parametrize("token", [None, "a-token-that-is-long-enougH", "", TOKEN + "x"])
def test_wrong_token(token, caplog):
    async def body():
        async with serving() as cloud:
            with pytest.raises(NetworkError, match="refuses this device: auth: no token, or a wrong one") as error:
                await write(cloud.url, token=token)
            return error.value.code, cloud.metrics.get("errors_total", code="auth")

    with caplog.at_level(logging.INFO, "spa_jax.cloud"):
        assert run(body) == ("auth", 1)
    assert '"code": "auth"' in caplog.text and "long-enoug" not in caplog.text


def test_who_needs_a_token():
    with pytest.raises(ConfigError, match=r"host = '0.0.0.0' can be reached from other machines: give a token"):
        Cloud(FakeCloud(), CloudConfig(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="the token has 5 characters: expected at least 16"):
        Cloud(FakeCloud(), token="short")
    with pytest.raises(ConfigError, match="a token would travel in the clear; use wss://"):
        Device("ws://example.org:8765", FakeDevice(), token=TOKEN)
    with pytest.raises(ConfigError, match="expected ws://host:port or wss://host:port"):
        Device("http://127.0.0.1", FakeDevice())
    for url in ("localhost:abc", "localhost:99999", "[::1", "..:80", f"{70 * 'x'}:80", ":80", ""):
        with pytest.raises(ConfigError, match="expected ws://host:port or wss://host:port"):
            Device(f"ws://{url}", FakeDevice())
    for url in ("ws://localhost:1", "ws://[::1]:1/", "wss://example.org"):
        Device(url, FakeDevice(), token=TOKEN)
    assert CloudConfig().host == "127.0.0.1"

    async def body():
        async with serving(token=None) as cloud:
            return (await write(cloud.url, token=None)).tokens

    assert run(body) == solo(PROMPT, 30)[0]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"port": 0, "reply_s": 0}, "reply_s = 0: expected seconds"),
        ({"idle_s": float("inf")}, "idle_s = inf: expected seconds"),
        ({"frame_bytes": 10}, "frame_bytes = 10"),
        ({"frame_bytes": 2**31}, "frame_bytes = 2147483648: expected from 1024 to 2147483647"),
        ({"port": -1}, "port = -1: expected a number from 0"),
        ({"port": 99999}, "port = 99999"),
        ({"tls_cert": "cert.pem"}, "TLS needs a certificate and its key"),
        ({"tls_cert": "no.pem", "tls_key": "no.pem"}, r"the certificate no.pem or its key cannot be used"),
    ],
)
def test_servers_that_cannot_be(wrong, expected):
    with pytest.raises(ConfigError, match=expected):
        Cloud(FakeCloud(), CloudConfig(**wrong), token=TOKEN)


def test_a_cloud_serves_once_and_leaves_nothing_behind_where_it_cannot():
    async def body():
        async with serving() as cloud:
            other, before = Cloud(FakeCloud(), CloudConfig(port=int(cloud.url.rsplit(":")[-1]))), asyncio.all_tasks()
            with pytest.raises(OSError):
                await other.__aenter__()
            assert asyncio.all_tasks() == before
        with pytest.raises(ConfigError, match="this Cloud has served before: make a new one"):
            await cloud.__aenter__()

    run(body)


@pytest.mark.parametrize(
    ("wants", "prompt", "expected", "code"),
    [
        ({"model": "base-2"}, PROMPT, "made for the base base-2, this server has base-1", "model"),
        ({"taps": np.array([1, 6])}, PROMPT, "tapped layers: expected ascending ones below 6", "plugin"),
        ({"taps": np.array([3, 1])}, PROMPT, "tapped layers", "plugin"),
        ({"gate": np.zeros((5, 2))}, PROMPT, r"gate: expected 9 rows .* got 5", "plugin"),
        ({"gate": None}, PROMPT, "setting spa has a gate: send its weights", "plugin"),
        ({"public": "quarter"}, PROMPT, "no public Down of the name 'quarter'; there is: half", "plugin"),
        ({}, [5, 101], "expected ids below 101", "bad-frame"),
        ({}, [5] * 65, "65 tokens: a session here holds 64", "too-long"),
        ({}, [5] * 1000, "a frame of .* bytes is needed, the server accepts 2048", "too-large"),
    ],
)
def test_refused_with_a_reason_on_both_sides(wants, prompt, expected, code):
    async def body():
        async with serving(frame_bytes=2048) as cloud:
            async with device(cloud, FakeDevice(wants=wants)) as one:
                with pytest.raises(NetworkError, match=expected) as error:
                    await one.generate(prompt, 5)
                assert one.history == []
            await released(cloud)
            return error.value.code, cloud.metrics.get("errors_total", code=code)

    assert run(body) == (code, code != "too-large")  # that one is never sent


def wrong_answers():
    """name -> (terms, what is said instead of an answer to Taps, code, what the server says about it)."""
    g = np.zeros(D, np.float32)
    state, step = {"threshold": 0.0}, {"threshold": 0.0, "head": "device"}
    yield "narrow g", state, SideState(3, g[:5]), "bad-frame", "side_state.g: expected 8 numbers, got 5"
    yield "old position", state, SideState(2, g), "bad-frame", "an answer for position 2: expected one for 3"
    yield "own token", state, Step(3, 1), "bad-frame", "expected a frame of side_state, got step"
    yield "state", step, SideState(3, g), "bad-frame", "expected a frame of step, got side_state"
    yield "no such token", step, Step(3, 101), "bad-frame", "expected an id below 101"
    yield "noise", state, b"\xc1\xff\x00", "bad-frame", "not a frame"
    yield "text", state, "hello", "bad-frame", "expected a binary frame"
    yield "nan", state, encode(SideState(3, g)).replace(b"\0\0\0\0", b"\0\0\xc0\x7f"), "bad-frame", "finite numbers"
    yield "cloud's frame", state, Token(1, "more"), "bad-frame", "expected a frame of hello, .*, got token"
    version = msgpack.packb([3, 5, 3])
    yield "newer", state, version, "protocol", "protocol version 3; this side speaks version 2"
    yield "silence", state, None, "timeout", "nothing was heard or taken for too long while writing"


@pytest.mark.parametrize("case", list(wrong_answers()), ids=lambda case: case[0])
def test_liars_are_told_and_hurt_nobody(case):
    _, terms, answer, code, expected = case

    async def body():
        async with serving(FakeCloud(slots=2), reply_s=1.0) as cloud:
            honest = asyncio.create_task(write(cloud.url))
            async with Liar(cloud, **terms) as liar:
                await liar.begin()
                await liar.until(Taps)
                if answer is not None:
                    await liar.say(answer)
                error = await liar.until(Error)
                with pytest.raises(ConnectionClosed):
                    await liar.hear()
            assert (await honest).tokens == solo(PROMPT, 30)[0]
            await released(cloud)
            assert (await write(cloud.url)).tokens == solo(PROMPT, 30)[0]
            return error, cloud.metrics.get("errors_total", code=code)

    error, counted = run(body)
    assert error.code == code and counted == 1
    assert re.search(expected, error.message), error.message


def test_oversize_frames_are_not_read():
    async def body():
        async with serving(frame_bytes=4096) as cloud, Liar(cloud) as liar:
            await liar.say(hello())
            await liar.hear()
            await liar.say(b"x" * 5000)
            with pytest.raises(ConnectionClosed) as closed:
                await liar.hear()
            for _ in range(100):
                if cloud.metrics.get("errors_total", code="too-large"):
                    break
                await asyncio.sleep(0.01)
            return closed.value.rcvd.code, cloud.metrics.get("errors_total", code="too-large")

    assert run(body) == (1009, 1)


def test_a_server_whose_frames_are_too_large():
    """The device says what it accepts; a cloud that needs more says so."""
    model = FakeDevice(wants={"frame_bytes": 1024, "threshold": 0.0})

    async def body():
        big = FakeCloud()
        big.embed = 400  # Taps with f of 400 numbers do not fit in 1 kB
        async with serving(big) as cloud:
            with pytest.raises(NetworkError, match=r"a frame of .* bytes is needed, the device accepts 1024") as error:
                model.wants |= {"head": "device", "gate": np.zeros((401, 2), np.float32)}
                big._one = lambda slot, token: type(FakeCloud._one(big, slot, token))(
                    1, np.ones(1), np.ones((4, 1, 8), np.float32), np.ones(400, np.float32)
                )
                await write(cloud.url, model)
            return error.value.code

    assert run(body) == "too-large"


def test_clients_that_vanish_stall_or_never_speak():
    """Their slots come back, and the others do not notice."""

    async def body():
        async with serving(FakeCloud(slots=4), hello_s=1.0, reply_s=1.0, send_s=1.0) as cloud:
            silent, vanisher, staller = Liar(cloud), Liar(cloud, threshold=0.0), Liar(cloud, threshold=0.0)
            async with silent, vanisher, staller:
                await vanisher.begin()
                await vanisher.until(Taps)
                vanisher.connection.transport.abort()
                await staller.begin()
                honest = await asyncio.gather(*(write(cloud.url) for _ in range(4)))
                assert all(answer.tokens == solo(PROMPT, 30)[0] for answer in honest)
                assert (await silent.hear()).code == "timeout"
                assert (await staller.until(Error)).code == "timeout"
                await released(cloud)
                return [cloud.metrics.get("errors_total", code=code) for code in ("lost", "timeout")]

    assert run(body) == [1, 2]


def test_lies_of_the_server_end_the_text():
    """A device checks what it is sent, too, and tells the server."""
    taps = np.ones((4, 1, D), np.float32)
    lies = {
        "token.token is not in the vocabulary": Token(101, "more"),
        "token.end is 'full' where limit, stop and context make it 'more'": Token(100, "full"),
        "taps.positions are not next": Taps(np.array([7]), True, taps, None),
        "taps.taps is not of the layers": Taps(np.array([3]), True, taps[:2], None),
        "taps.hidden is not what hello asked for": Taps(np.array([3]), True, taps, taps[0, 0]),
        "expected a frame of taps, token, got welcome": Welcome("s", "base-1", 101, D, 64, 4096, 1.0),
        "not a frame": b"\xc1",
        "protocol version 3": msgpack.packb([3, 9]),
    }

    async def body():
        heard = []

        async def lie(connection):
            await connection.recv()
            await connection.send(encode(Welcome("s", "base-1", 101, D, 64, 4096, 1.0)))
            assert isinstance(decode(await connection.recv()), Resume)
            await connection.send(said if isinstance(said, bytes) else encode(said))
            heard.append(decode(await connection.recv()))

        async with serve(lie, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for expected, said in lies.items():  # noqa: B007
                with pytest.raises(NetworkError, match=expected) as error:
                    await write(url, token=None)
                await asyncio.sleep(0.01)
                assert heard[-1].code == error.value.code and expected in heard[-1].message
            assert len(heard) == len(lies)

    run(body)


def test_a_server_that_does_not_end_a_text_is_stopped():
    """The device counts for itself: no more tokens than it asked for, and none behind a stop token."""

    async def lie(connection):
        await connection.recv()
        await connection.send(encode(Welcome("s", "base-1", 101, D, 64, 4096, 1.0)))
        await connection.recv()
        for _ in range(10):
            await connection.send(encode(Token(3, "more")))
        await connection.wait_closed()

    async def body():
        async with serve(lie, "127.0.0.1", 0) as server:
            url, heard = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", []
            for stop, count, end in (((), 4, "limit"), ((3,), 0, "stop")):
                heard.clear()
                with pytest.raises(NetworkError, match=f"'more' where limit, stop and context make it '{end}'"):
                    async with device(url, token=None) as one:
                        await one.generate(PROMPT, 5, stop, lambda *new: heard.append(new))
                assert len(heard) == count

    run(body)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (([], 5), "tokens is empty: expected at least one"),
        (([-1], 5), "prefill.tokens: expected numbers from 0"),
        (([5], 0), "prefill.limit: expected a whole number from 1"),
        (([5], 5, [-1]), "prefill.stop: expected numbers from 0"),
        (([5], 5, [2**40]), "prefill.stop: expected numbers from 0"),
        (([5], 5, ["a"]), "prefill.stop: expected int32"),
        (([5], 5, [2.5]), "prefill.stop: expected int32"),
    ],
)
def test_texts_that_cannot_be_asked_for(text, expected):
    """They are refused before a connection is made; nothing was said."""
    one = Device("ws://127.0.0.1:9", FakeDevice())
    with pytest.raises(ConfigError, match=expected):
        run(lambda: one.generate(*text))
    assert one.history == []


def test_one_text_at_a_time():
    async def body():
        async with serving(FakeCloud(seconds=0.01)) as cloud, device(cloud) as one:
            first = asyncio.create_task(one.generate(PROMPT, 5))
            await asyncio.sleep(0)
            with pytest.raises(ConfigError, match="this device is writing a text: wait for its end"):
                await one.generate(PROMPT, 5)
            assert (await first).tokens == solo(PROMPT, 5)[0]
            await one.generate(PROMPT, 5)

    run(body)
