"""What others can see: TLS, logs without text, metrics, and frames in which no weight of a plugin ever travels."""

import asyncio
import json
import logging
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from spa_jax.budget import Pace
from spa_jax.channel import DeviceConfig
from spa_jax.errors import NetworkError
from spa_jax.network import Link, Proxy
from spa_jax.wire import FROM_DEVICE, Bye, Hello, Prefill, Resume, SideState, Step, decode
from tests.spa.fake_models import GATE, FakeCloud, FakeDevice, solo
from tests.spa.runtime import PROMPT, QUICK, TOKEN, check_no_weights, device, run, serving, write


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """good.pem and expired.pem for 127.0.0.1, each its own authority, and key.pem."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = lambda *args: subprocess.run(["openssl", *args], cwd=folder, capture_output=True, text=True)  # noqa: E731
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem"]
    try:
        made = openssl(*new, "-out", "good.pem", "-days", "2", *name)
    except FileNotFoundError:
        pytest.skip("no openssl to make certificates with")
    assert made.returncode == 0, made.stderr
    old = openssl("x509", "-in", "good.pem", "-signkey", "key.pem", "-days", "-1", "-out", "expired.pem")
    if old.returncode:  # OpenSSL 3.4 has dates instead
        dates = ["-not_before", "20200101000000Z", "-not_after", "20210101000000Z"]
        old = openssl("req", "-x509", "-key", "key.pem", "-out", "expired.pem", *dates, *name)
    if old.returncode:
        pytest.skip(f"this openssl makes no expired certificate: {old.stderr[:200]}")
    return folder


@pytest.mark.parametrize(
    ("server", "trusted", "expected"),
    [
        ("good.pem", "good.pem", None),
        ("good.pem", None, "the server's certificate is not good: self-signed certificate"),
        ("expired.pem", "expired.pem", "the server's certificate is not good: certificate has expired"),
    ],
)
def test_tls(certificates, server, trusted, expected):
    tls = {"tls_cert": certificates / server, "tls_key": certificates / "key.pem"}
    config = DeviceConfig(cafile=trusted and certificates / trusted, retries=1)

    async def body():
        async with serving(**tls) as cloud:
            assert cloud.url.startswith("wss://")
            return await write(cloud.url, config=config)

    if expected is None:
        assert run(body).tokens == solo(PROMPT, 30)[0]
    else:
        with pytest.raises(NetworkError, match=expected) as error:
            run(body)
        assert error.value.code == "tls"


PLACEMENTS = {
    "head in the cloud": {},
    "projected in the cloud": {"public": "half"},
    "head on the device": {"head": "device"},
    "projected, head on the device": {"public": "half", "head": "device"},
    "int8": {"coding": "int8"},
    "fp16": {"coding": "fp16"},
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_no_weight_of_a_plugin_is_ever_sent(case):
    """All bytes of a whole conversation, in every placement: the device says what the table of the docs says, no more.

    The tests of the real model look for its weights in the same way.
    """
    model = FakeDevice(wants=PLACEMENTS[case])

    async def body():
        async with serving() as cloud, Proxy(cloud.url, capture=True, cut={40}) as proxy, device(proxy, model) as one:
            await one.generate(PROMPT, 20)
            await one.generate([7], 10)
            return proxy.captured

    captured = run(body)
    check_no_weights(captured, [model.weights])
    up = [decode(data, FROM_DEVICE) for way, data in captured if way == "up"]
    kinds = {type(message) for message in up}
    answer = Step if model.terms().head == "device" else SideState
    assert {Hello, Resume, answer} <= kinds <= {Hello, Prefill, Resume, answer, Bye}
    assert all(np.array_equal(message.gate, GATE) for message in up if isinstance(message, Hello))


def test_logs_hold_no_text(caplog):
    """Neither tokens nor the numbers they come from; one line of JSON an event."""

    async def body():
        async with serving(frame_bytes=2048) as cloud:
            answer = await write(cloud.url)
            with pytest.raises(NetworkError):
                await write(cloud.url, FakeDevice(wants={"public": "secret-name"}))
            return answer.tokens

    with caplog.at_level(logging.DEBUG, "spa_jax"):
        tokens = run(body)
    events = [json.loads(record.message) for record in caplog.records if record.name == "spa_jax.cloud"]
    assert [event["event"] for event in events] == ["listening", "ended", "ended", "closed"]
    assert events[1] == events[1] | {"code": "ok", "tokens": 30} and events[2]["code"] == "plugin"
    assert set(events[1]) == {"event", "session", "code", "doing", "tokens", "exchanges", "bytes_up", "bytes_down"}
    assert str(tokens)[1:9] not in caplog.text and TOKEN not in caplog.text and "secret-name" not in caplog.text


def test_the_log_says_where_the_server_failed(caplog):
    """Files and lines, innermost last; no words of the exception, which may hold what was written."""

    async def body():
        async with serving(FakeCloud(fails=True)) as cloud:
            with pytest.raises(NetworkError, match="its log says where"):
                await write(cloud.url, config=DeviceConfig(retries=0))

    with caplog.at_level(logging.INFO, "spa_jax.cloud"):
        run(body)
    events = [json.loads(record.message) for record in caplog.records if record.name == "spa_jax.cloud"]
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["error"] == "RuntimeError" and failed["at"][-1].startswith("fake_models.py:")
    assert len(failed["at"]) == 4 and "out of memory" not in caplog.text


def test_metrics():
    def get(cloud, path, token=TOKEN):
        url = cloud.url.replace("ws://", "http://") + path
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    async def body():
        async with serving() as cloud, device(cloud) as one:
            await one.generate(PROMPT, 12)
            paths = [("/metrics",), ("/metrics", "no"), ("/healthz", "no"), ("/other",)]
            return [await asyncio.to_thread(get, cloud, *path) for path in paths]

    found, refused, health, other = run(body)
    assert [status for status, _ in (found, refused, health, other)] == [200, 401, 200, 404]
    lines = found[1].splitlines()
    used = sum(solo(PROMPT, 12)[1])
    assert f'spa_tokens_total{{by="side"}} {used}' in lines and f"spa_exchange_seconds_count {used}" in lines
    assert "spa_sessions 1" in lines and "spa_prompt_tokens_total 4" in lines
    assert 'spa_token_seconds_bucket{le="+Inf"} 11' in lines and "# TYPE spa_step_seconds histogram" in lines
    for metric in ("steps_total", "batch_fill_total", "bytes_total", "errors_total", "evictions_total"):
        assert f"# HELP spa_{metric}" in found[1]


def test_a_budget_is_kept_by_asking_for_what_matters_most():
    """Half of the tokens can be paid for: they are those whose gate says most, and the average holds."""
    rng = np.random.default_rng(0)
    pace, spent, asked, wanted = Pace(20.0), 0.0, [], rng.random(2000)
    for i, p in enumerate(wanted):
        slow = 1 if i < 1000 else 3  # then the link becomes three times as slow
        spent += 10
        asked.append(pace.allows(p, 0.2, 10.0))
        if asked[-1]:
            pace.exchanged(20.0 * slow)
            spent += 20.0 * slow
    asked = np.array(asked)
    assert spent / 2000 == pytest.approx(20, rel=0.05)
    assert asked[100:1000].mean() == pytest.approx(1 / 2, abs=0.06)
    assert asked[1100:].mean() == pytest.approx(1 / 6, abs=0.03)
    assert wanted[asked].mean() > 0.7 and not asked[wanted < 0.2].any()


def test_a_budget_that_pays_for_nothing_still_looks_whether_the_link_is_better():
    pace = Pace(5.0)
    asked = []
    for _ in range(300):
        asked.append(pace.allows(0.9, 0.5, 10.0))
        if asked[-1]:
            pace.exchanged(50.0)
    assert 3 <= sum(asked) <= 6


def test_what_happens_once_does_not_ruin_a_budget():
    """A token or a round trip that takes seconds, be it another's prompt or a compile, is forgotten soon."""
    for cloud_ms, exchange_ms in ((3000.0, 20.0), (10.0, 3000.0)):
        pace, asked = Pace(40.0), 0
        for i in range(60):
            if pace.allows(0.9, 0.5, cloud_ms if i == 10 else 10.0):
                pace.exchanged(exchange_ms if i == 10 else 20.0)
                asked += i > 10
        assert asked > 30


def test_a_long_prompt_and_a_replay_are_no_part_of_a_budget():
    """As many tokens use the side network as after a prompt that is read at once."""
    model = FakeDevice(wants={"threshold": 0.0, "budget": 100.0})

    class Slow(FakeCloud):
        def extend(self, slot, tokens):
            time.sleep(0.3)
            return super().extend(slot, tokens)

    async def body():
        async with serving(Slow(chunk=8)) as cloud, Proxy(cloud.url, cut={40}) as proxy:
            return await write(proxy.url, model, 30)

    answer = run(body)
    assert answer.stats.connections == 2 and all(answer.used)


def test_a_session_with_a_budget():
    """The cloud measures its round trips to this device and asks less often on a slow link."""
    model = FakeDevice(wants={"setting": "spa", "threshold": 0.0, "budget": 8.0})

    async def body():
        async with serving(FakeCloud()) as cloud:
            async with Proxy(cloud.url, Link(rtt_ms=40)) as proxy:
                slow = await write(proxy.url, model, 40)
            return slow, await write(cloud.url, FakeDevice(wants=model.wants | {"budget": 1e4}), 40, config=QUICK)

    slow, fast = run(body)
    assert all(fast.used) and 0 < sum(slow.used) <= 20
