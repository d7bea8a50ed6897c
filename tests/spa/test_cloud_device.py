"""Two places, one text: over the network as in one process, whatever breaks on the way. Fake models, real sockets."""

import asyncio
import threading
import time

import pytest

from spa_jax.channel import DeviceConfig
from spa_jax.cloud import Cloud, CloudConfig, Slots
from spa_jax.errors import NetworkError
from spa_jax.network import Proxy
from spa_jax.session import Refused
from spa_jax.wire import Taps
from tests.spa.fake_models import FakeCloud, FakeDevice, solo
from tests.spa.runtime import PROMPT, TOKEN, Liar, device, released, run, serving, write

PLACEMENTS = {
    "default": {},
    "head on device": {"head": "device"},
    "projected": {"public": "half"},
    "projected, head on device": {"public": "half", "head": "device"},
    "fp16": {"coding": "fp16"},
    "small frames": {"frame_bytes": 1024},
    "sent ahead": {"threshold": 0.8},
    "sparse": {"memory": "sparse"},
    "stateless": {"memory": "stateless"},
    "s1": {"setting": "s1", "gate": None},
    "s3, head on device": {"setting": "s3", "gate": None, "head": "device"},
    "always": {"threshold": 0.0},
    "never": {"threshold": 2.0},
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_texts_are_those_of_one_process(case):
    """In every placement, in several turns, ended by a stop token, a limit or a full session."""
    model = FakeDevice(wants=PLACEMENTS[case])

    async def body():
        history = []
        ahead = {"waiting_bytes": 1000} if case == "sent ahead" else {}
        async with serving(**ahead) as cloud, device(cloud, model) as one:
            for prompt, limit, stop in ((PROMPT, 12, ()), ([7, 8], 9, (1, 2, 3, 4, 5, 50)), ([3] * 11, 50, ())):
                heard, first = [], not history
                answer = await one.generate(prompt, limit, stop, lambda *new: heard.append(new))  # noqa: B023
                history += prompt
                texts, used, end = solo(history, limit, stop, model)
                assert heard == list(zip(texts, used, strict=True)) and answer.used == used
                assert answer.end == end and answer.tokens == (texts[:-1] if end == "stop" else texts)
                assert answer.stats.round_trips == sum(used) and answer.stats.connections == first
                history += texts
                assert one.history == history
            assert end == "full"

    run(body)


@pytest.mark.parametrize("case", ["default", "head on device", "sparse", "small frames"])
def test_cut_at_each_frame(case):
    """A 30-token answer, its link cut at every frame in turn, there and back: the same text, no position twice."""
    model = FakeDevice(wants=PLACEMENTS[case])
    texts, used, _ = solo(PROMPT, 30, device=model)

    async def body():
        async with serving(FakeCloud(slots=2)) as cloud:
            async with Proxy(cloud.url) as whole:
                assert (await write(whole.url, model)).tokens == texts
            frames = whole.traffic.frames
            assert frames > 40
            for k in range(frames):
                begin = time.perf_counter()
                async with Proxy(cloud.url, cut={k}) as proxy:
                    answer = await write(proxy.url, model)
                assert (answer.tokens, answer.used) == (texts, used), k
                assert answer.stats.connections == 2 or k >= frames - 2, k  # nothing is missed of a goodbye
                assert time.perf_counter() - begin < 10
            async with Proxy(cloud.url, cut=range(3, 200, 7)) as proxy:  # and again and again
                answer = await write(proxy.url, model)
                assert answer.tokens == texts and answer.stats.connections > 4
            await released(cloud)

    asyncio.run(asyncio.wait_for(body(), 120))


def test_64_devices_at_once():
    """Different plugins and placements on one cloud with fewer slots than devices; each text equals its solo run."""
    wants = [{}, {"head": "device"}, {"public": "half"}, {"setting": "s1", "gate": None}, {"threshold": 2.0}]
    models = [FakeDevice(secret=i, wants=wants[i % 5]) for i in range(64)]
    cloud_model = FakeCloud(slots=48)

    async def body():
        async with serving(cloud_model) as cloud:
            answers = await asyncio.gather(*(write(cloud.url, model, 20, config=DeviceConfig()) for model in models))
            await released(cloud)
            return answers, cloud.metrics

    answers, metrics = run(body)
    for model, answer in zip(models, answers, strict=True):
        assert answer.tokens == solo(PROMPT, 20, device=model)[0]
    assert len({tuple(answer.tokens) for answer in answers}) > 20
    assert max(cloud_model.batches) > 16, "steps of concurrent sessions are batched"
    assert metrics.get("tokens_total", by="side") + metrics.get("tokens_total", by="base") == 64 * 20
    assert metrics.get("batch_fill_total") == sum(cloud_model.batches)


def test_idle_sessions_lose_their_slot_and_resume():
    """By time, and when another needs it; a chat goes on where it was."""

    async def body():
        async with serving(FakeCloud(slots=1), idle_s=0.2) as cloud, device(cloud) as one, device(cloud) as two:
            texts = []
            for who, pause in ((one, 0), (two, 0), (one, 0), (one, 0.5), (two, 0)):
                await asyncio.sleep(pause)
                history = [*who.history, *PROMPT]
                answer = await who.generate(PROMPT, 5)
                assert answer.tokens == solo(history, 5)[0]
                texts.append(answer.stats.connections)
            return texts, cloud.metrics.get("evictions_total")

    connections, evictions = run(body)
    assert connections == [1, 1, 0, 0, 0] and evictions >= 4


def test_who_waits_gets_the_slot_of_a_text_that_ends():
    """Not only that of a session that was idle already."""

    async def body():
        async with serving(FakeCloud(slots=1, seconds=0.01)) as cloud, device(cloud) as one, device(cloud) as two:
            begun = asyncio.Event()
            first = asyncio.create_task(one.generate(PROMPT, 20, on_token=lambda *_: begun.set()))
            await begun.wait()
            second = await two.generate(PROMPT, 5)
            assert second.stats.connections == 1 and second.tokens == (await first).tokens[:5]
            return cloud.metrics.get("errors_total", code="busy"), cloud.metrics.get("evictions_total")

    assert run(body) == (0, 1)


def test_no_slot_is_lost_when_it_comes_as_the_time_is_up():
    async def body():
        slots = Slots(1)
        slot = await slots.acquire(1)
        waiter = asyncio.create_task(slots.acquire(0.05))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.049, slots.release, slot)
        time.sleep(0.06)  # both are due in one turn of the loop
        try:
            slots.release(await waiter)
        except Refused as error:
            assert error.code == "busy"
        assert slots.free == [0] and not slots.wanted

    run(body)


def test_a_full_server_says_so():
    async def body():
        async with serving(FakeCloud(slots=1), queue_s=0.1, reply_s=3) as cloud, Liar(cloud, threshold=0.0) as liar:
            await liar.begin()
            await liar.until(Taps)  # holds the slot, and does not answer
            patience = DeviceConfig(retries=1, backoff_s=0.01)
            with pytest.raises(NetworkError, match=r"\(busy\): all sessions of this server are in use") as error:
                await write(cloud.url, config=patience)
        async with serving(connections=1) as cloud, Liar(cloud), device(cloud, config=patience) as one:
            with pytest.raises(NetworkError, match="503: busy: 1 connections are open"):
                await one.generate(PROMPT, 5)
        return error.value.code

    assert run(body) == "busy"
    assert CloudConfig().queue_s < DeviceConfig().reply_s, "else the device calls a full server silent"


def test_a_slow_server_and_a_stalled_link_end_with_what_there_is():
    async def body():
        hasty = DeviceConfig(answer_s=1.5)
        async with serving(FakeCloud(seconds=0.05)) as cloud:
            slow = await write(cloud.url, limit=60, config=hasty)
        async with serving() as cloud, Proxy(cloud.url, stall=20) as proxy:
            begin = time.perf_counter()
            stalled = await write(proxy.url, config=DeviceConfig(connect_s=1.0, reply_s=1.0, retries=1))
            return slow, stalled, time.perf_counter() - begin

    slow, stalled, seconds = run(body)
    whole = solo(PROMPT, 60)[0]
    for answer in (slow, stalled):
        assert answer.end == "timeout" and 0 < len(answer.tokens) < 60 and answer.note
        assert answer.tokens == whole[: len(answer.tokens)]
    assert seconds < 20


class SlowReader(FakeCloud):
    """One whose prompts take their time."""

    reads = 0

    def extend(self, slot, tokens):
        self.reads += 1
        time.sleep(0.15)
        return super().extend(slot, tokens)


def test_a_long_prompt_is_read_however_long_it_takes():
    """The device's patience for the next frame begins with the first; a prompt that nobody waits for is not read on."""
    prompt, hasty = list(range(18)), DeviceConfig(reply_s=0.6, backoff_s=0.01)

    async def body():
        patient, abandoned = SlowReader(), SlowReader()
        async with serving(patient) as cloud, device(cloud, config=hasty) as one:
            answer = await one.generate(prompt, 5)
        async with serving(abandoned) as cloud:
            async with device(cloud, config=DeviceConfig(answer_s=0.25)) as one:
                left = await one.generate(prompt, 5)
            await released(cloud)
        return answer, patient.reads, left, abandoned.reads

    answer, whole, left, some = run(body)
    assert (answer.tokens, answer.stats.connections, whole) == (solo(prompt, 5)[0], 1, 6)
    assert left.end == "timeout" and not left.tokens and some < 6


def test_without_a_server():
    async def body():
        none = "ws://127.0.0.1:9"
        patience, begin = DeviceConfig(retries=2, backoff_s=0.1), time.monotonic()
        with pytest.raises(NetworkError, match=r"no connection to ws://127.0.0.1:9: .* Is the server .* running"):
            await write(none, config=patience)
        assert time.monotonic() - begin > 0.1 + 0.2  # waits longer each time
        return await write(none, limit=5, config=patience, fallback=lambda history, limit, stop: range(40, 60))

    answer = run(body)
    assert answer.tokens == [40, 41, 42, 43, 44] and (answer.local, answer.end) == (5, "limit")
    assert answer.note.endswith("The device went on with its own model.")


def test_server_gone_in_the_middle_goes_on_locally():
    """The fallback gets all tokens so far; when the server is back, the next text is the cloud's again."""
    asked = []

    def fallback(history, limit, stop):
        asked.append((history, limit, stop))
        return iter([50, 51, 2, 52])

    async def body():
        async with serving() as cloud:
            proxy = Proxy(cloud.url, stall=30)
            async with (
                proxy,
                device(proxy, config=DeviceConfig(connect_s=1.0, reply_s=1.0, retries=1), fallback=fallback) as one,
            ):
                answer = await one.generate(PROMPT, 30, [2])
                proxy.stall = None
                history = list(one.history)
                again = await one.generate([8], 6)
            return answer, history, again

    answer, history, again = run(body)
    whole = solo(PROMPT, 30, [2])[0]
    written = len(answer.tokens) - 2
    assert (
        answer.tokens == [*whole[:written], 50, 51] and 0 < written < 30 and (answer.local, answer.end) == (2, "stop")
    )
    assert asked == [([*PROMPT, *whole[:written]], 30 - written, [2])]
    assert history == [*PROMPT, *whole[:written], 50, 51, 2]
    assert again.tokens == solo([*history, 8], 6)[0] and again.local == 0


def test_a_failing_fallback_loses_no_text():
    def fallback(history, limit, stop):
        yield 50
        raise ValueError("too long for it")

    async def body():
        async with serving() as cloud, Proxy(cloud.url, cut=range(8, 1000)) as proxy:
            return await write(proxy.url, config=DeviceConfig(retries=0), fallback=fallback)

    answer = run(body)
    assert answer.tokens == [*solo(PROMPT, 30)[0][: len(answer.tokens) - 1], 50] and answer.local == 1
    assert answer.end == "lost" and answer.note.endswith("own model failed: ValueError: too long for it")


def test_a_failing_model_ends_its_sessions_not_the_server():
    model = FakeCloud()

    async def body():
        async with serving(model) as cloud:
            model.fails = True
            with pytest.raises(NetworkError, match=r"\(internal\): the server failed at this"):
                await write(cloud.url, config=DeviceConfig(retries=1, backoff_s=0.01))
            model.fails = False
            return (await write(cloud.url)).tokens, cloud.metrics.get("errors_total", code="internal")

    assert run(body) == (solo(PROMPT, 30)[0], 2)


def serve_until(body, model):
    """As `spa serve` does it: ``body(cloud, serving)`` runs beside a server with a text of 60 tokens in the making."""

    async def main():
        cloud, up = Cloud(model, CloudConfig(port=0), token=TOKEN), asyncio.Event()

        async def serve():
            async with cloud:
                up.set()
                await cloud.serve_forever()

        task = asyncio.create_task(serve())
        await up.wait()
        async with device(cloud, config=DeviceConfig(retries=0)) as one:
            begun = asyncio.Event()
            text = asyncio.create_task(one.generate(PROMPT, 60, on_token=lambda *_: begun.set()))
            await begun.wait()
            body(cloud, task)
            await asyncio.wait([task, text], timeout=5)
            assert task.done() and text.done(), "it hangs"
            return task, text.result()

    return run(main)


def test_a_server_ends_at_once_while_it_writes():
    """Ctrl-C cancels the main task; the engine lives until the sessions have ended."""
    task, answer = serve_until(lambda cloud, task: task.cancel(), FakeCloud(seconds=0.02))
    assert task.cancelled() and answer.end == "lost" and 0 < len(answer.tokens) < 60
    assert "(closing): the server is shutting down" in answer.note


def test_a_dead_engine_tells_its_sessions_and_ends_the_server():
    async def die():
        raise RuntimeError("no more")

    def kill(cloud, task):
        cloud.engine._round = die

    task, answer = serve_until(kill, FakeCloud(seconds=0.02))
    assert str(task.exception()) == "no more" and answer.end == "lost" and "(closing)" in answer.note


def test_closed_while_it_writes():
    async def body():
        async with serving() as cloud:
            one, began = device(cloud, fallback=lambda *_: [1]), asyncio.Event()
            writing = asyncio.create_task(one.generate(PROMPT, 30, (), lambda *_: began.set()))
            await began.wait()
            await one.close()
            answer = await writing
            texts, _, _ = solo(PROMPT, 30)
            assert answer.end == "lost" and "closed while a text was written" in answer.note and answer.local == 0
            assert 0 < len(answer.tokens) < 30 and answer.tokens == texts[: len(answer.tokens)]
            assert one.history == [*PROMPT, *answer.tokens]
            again = await one.generate([7], 4)  # goes on from there
            assert again.tokens == solo([*PROMPT, *answer.tokens, 7], 4)[0]
            await one.close()

    run(body)


def test_a_server_that_comes_back_with_another_base_leaves_what_was_written():
    async def body():
        async with serving() as cloud, serving(FakeCloud(fingerprint="another")) as other:
            one = device(cloud)

            def moved(*_):
                if len(one.history) == len(PROMPT) + 5:
                    one._channel.url = other.url
                    one._channel.drop()

            answer = await one.generate(PROMPT, 30, (), moved)
            assert answer.end == "lost" and "base" in answer.note
            assert answer.tokens == solo(PROMPT, 5)[0] and one.history == [*PROMPT, *answer.tokens]

    run(body)


def test_an_error_of_on_token_is_the_callers():
    """A TimeoutError, too, which is not the device's own."""

    def fails(*_):
        raise TimeoutError("theirs")

    async def body():
        async with serving() as cloud, device(cloud) as one:
            with pytest.raises(TimeoutError, match="theirs"):
                await one.generate(PROMPT, 30, (), fails)
            assert one.history == []
            assert (await one.generate(PROMPT, 4)).tokens == solo(PROMPT, 4)[0]

    run(body)


def test_a_device_may_be_used_from_one_event_loop_after_another():
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    there = lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(10)  # noqa: E731
    cloud = there(Cloud(FakeCloud(), CloudConfig(port=0), token=TOKEN).__aenter__())
    try:
        one = device(cloud)
        first = run(lambda: one.generate(PROMPT, 5)).tokens
        second = run(lambda: one.generate([7], 5)).tokens
        assert [*first, *second] == [*solo(PROMPT, 5)[0], *solo([*PROMPT, *first, 7], 5)[0]]
        run(one.close)
    finally:
        there(cloud.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
