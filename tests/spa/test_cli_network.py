"""The split runtime as a user types it: a server in a process of its own, and devices that talk to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mlfs_jax.errors import ConfigError
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.hf.gguf_tokenizer import PRE_TOKENIZERS
from mlfs_jax.hf.gguf_write import export_gguf
from mlfs_jax.hf.load import from_pretrained, model_folder
from mlfs_jax.run import Run
from spa_jax import cli_device
from spa_jax.cli import main
from spa_jax.config import FIT
from spa_jax.device import Device
from spa_jax.errors import PluginError
from spa_jax.network import Link, Shape, methods, predict
from spa_jax.options import budget_ms, make_token, numbers, read_token
from spa_jax.plugin import Plugin, load_plugin, save_plugin, tokenizer_fingerprint
from spa_jax.seam import Setting
from tests.mlfs.gguf_files import byte_level_tokenizer
from tests.mlfs.tiny import tiny_decoder
from tests.spa.conftest import save_tokenizer
from tests.spa.fake_models import FakeDevice
from tests.spa.tiny_side import LADDER, tiny_side

CURVE = [{"usage": u / 10, "threshold": 1 - u / 10, "loss": 1.0, "oracle": 1.0} for u in range(11)]


@pytest.fixture(scope="module")
def base(tiny_lm):
    return from_pretrained(tiny_lm)


@pytest.fixture
def plugin(base, tiny_lm, tmp_path):
    fingerprints = base_fingerprint(base.config, base.base), tokenizer_fingerprint(tiny_lm)
    made = Plugin(tiny_side(base, LADDER), Setting.SPA, *fingerprints, calibration=CURVE)
    save_plugin(tmp_path / "alice", made)
    return tmp_path / "alice"


@pytest.fixture(scope="module")
def server(tiny_lm, base, tmp_path_factory):
    """(url, token file, public file) of a running `spa serve`."""
    folder = tmp_path_factory.mktemp("server")
    token, public = folder / "token", folder / "down.safetensors"
    token.write_text("0123456789abcdef0123\n")
    save_plugin(folder / "run", Plugin(tiny_side(base, LADDER), Setting.SPA, "", ""))
    assert main(["publish", str(folder / "run"), "--out", str(public), "--gate"]) == 0
    flags = f"serve --model {tiny_lm} --port 0 --token-file {token} --public {public} --slots 2 --context 48"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from spa_jax.cli import main; sys.exit(main())", *flags.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[0].startswith("memory: base"), (lines, process.stderr.read() if process.poll() else "")
        yield re.search(r"ws://\S+", lines[1])[0], str(token), str(public)
    finally:
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=30)
        events = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
        assert events[0]["event"] == "listening" and "w5" not in logged
        assert process.returncode == 0 and "Traceback" not in logged
        assert events[-1]["event"] == "closed", events[-3:]


def test_generate_and_chat(server, plugin, tiny_lm, capsys, monkeypatch):
    url, token, _ = server
    common = ["--server", url, "--token-file", token, "--plugin", str(plugin), "--tokenizer", str(tiny_lm)]
    texts = {}
    as_one = ("", "--head device", "--project cloud", "--project cloud --public-gate")
    for placement in (*as_one, "--coding int8", "--int8"):
        flags = [*placement.split(), "--prompt", "w5 w9 w11", "--max-new-tokens", "12", "--json"]
        assert main(["generate", *common, *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["round_trips"] == round(found["usage"] * 12) and found["end"] in ("limit", "stop")
        assert found["bytes_up"] > 0 and found["ms_device"] < found["ms_total"] and found["note"] == ""
        texts[placement] = found["text"]
    assert len({texts[p] for p in as_one}) == 1 and texts[""].startswith(" w")
    assert main(["generate", *common, "--prompt", "w5", "--usage", "0", "--stats", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"round_trips +0\b", printed) and "device_memory_mb" in printed

    lines = iter(["w5 w9", "w3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", *common, "--max-new-tokens", "4", "--stats"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tokens_per_second") == 2 and re.findall(r"connections +(\d)", printed) == ["1", "0"]

    lines = iter(["w5 " * 40, "w3 " * 20, ""])
    assert main(["chat", *common, "--max-new-tokens", "4", "--stats"]) == 0
    printed = capsys.readouterr()
    assert re.findall(r"connections +(\d)", printed.out) == ["1", "1"]
    assert "a session here holds" in printed.err and "A new session begins with this line." in printed.err


def test_ctrl_c_ends_a_chat_that_waits_for_a_line(monkeypatch):
    """At once, not at the next Enter."""
    waiting, enter = threading.Event(), threading.Event()

    def ask(prompt):
        waiting.set()
        enter.wait(5)
        raise EOFError

    def press():
        waiting.wait(5)
        time.sleep(0.2)  # until the loop sleeps, as it does when a person presses a key
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    kit = SimpleNamespace(device=lambda: Device("ws://127.0.0.1:9", FakeDevice()))
    monkeypatch.setattr(cli_device, "Kit", lambda options: kit)
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    threading.Thread(target=press).start()
    begin = time.monotonic()
    assert main(["chat", "--server", "x", "--plugin", "x"]) == 130
    assert time.monotonic() - begin < 4
    enter.set()


def test_a_fallback_reads_the_plugins_tokens_and_writes_what_fits(tiny_lm, tmp_path):
    own = cli_device._fallback(str(tiny_lm), tokenizer_fingerprint(tiny_lm))
    assert len(own([5] * 60, 10, [])) == 4 and list(own([5] * 64, 10, [])) == [], "its context is 64"
    with pytest.raises(PluginError, match=r"fallback = '.*' reads other token ids than this plugin's base"):
        cli_device._fallback(str(tiny_lm), tokenizer_fingerprint(save_tokenizer(tmp_path / "other", words=30)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--token-file", "none"], "token-file none is not there"),
        (["--token-file", "WRONG"], "refuses this device: auth: no token, or a wrong one"),
        (["--server", "ws://127.0.0.1:9"], "no connection to ws://127.0.0.1:9"),
        (["--server", "127.0.0.1:9"], "expected ws://host:port"),
        (["--budget", "fast"], "budget = 'fast': expected ms per token, like \"40 ms/token\""),
        (["--server", "ws://localhost:99999"], "expected ws://host:port or wss://host:port; Port out of range"),
        (["--public-gate"], "public-gate: the cloud finds a gate by the Down beside it; give --project cloud"),
        (["--usage", "2"], "usage = 2.0: expected a share"),
        (["--tokenizer", "OTHER"], "this plugin was made with another tokenizer than the one in"),
    ],
)
def test_mistakes_are_one_line(server, plugin, tiny_lm, tmp_path, capsys, changes, expected):
    url, token, _ = server
    (tmp_path / "WRONG").write_text("x" * 20)
    save_tokenizer(tmp_path / "OTHER", words=30)
    changes = [str(tmp_path / part) if part in ("WRONG", "OTHER") else part for part in changes]
    flags = {"--server": url, "--token-file": token, "--plugin": str(plugin), "--tokenizer": str(tiny_lm)}
    flags |= dict([changes]) if len(changes) == 2 else {}
    given = [x for pair in flags.items() for x in pair] + (changes if len(changes) == 1 else [])
    assert main(["generate", *given, "--prompt", "w5"]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_serve_refuses(tiny_lm, tmp_path, capsys):
    assert main(f"serve --model {tiny_lm} --host 0.0.0.0 --slots 1".split()) == 2
    assert "give a token that devices have to know" in capsys.readouterr().err
    assert main(f"serve --model {tiny_lm} --public {tmp_path / 'no'} --slots 1".split()) == 2
    assert "holds no public Down" in capsys.readouterr().err
    assert main(f"serve --model {tiny_lm} --slots 1 --context 65".split()) == 2
    assert "context = 65: this model has 64 positions" in capsys.readouterr().err
    for flags, expected in (("--frame-mb nan", "frame-mb = nan"), ("--port 99999", "port = 99999")):
        assert main(f"serve --model {tiny_lm} {flags}".split()) == 2
        assert f"{expected}: expected" in capsys.readouterr().err


def test_calibrate_writes_the_plugin(plugin, capsys):
    times = ["--cloud-ms", "20", "--device-ms", "5", "--rtt", "15", "--bandwidth", "1000"]
    for budget, usage in (("30 ms/token", 0.5), ("21", 0.05), ("500 ms", 1.0)):
        assert main(["calibrate", str(plugin), "--budget", budget, *times, "--json"]) == 0
        found, saved = json.loads(capsys.readouterr().out), load_plugin(plugin)
        assert found["usage"] == saved.usage == pytest.approx(usage, abs=0.01)
        assert saved.threshold == found["threshold"]
        assert saved.threshold == (0.0 if usage == 1 else pytest.approx(1 - usage, abs=0.01))
    for flags, expected in (
        ("--cloud-ms=-50", "cloud-ms = -50.0: expected ms"),
        ("--device-ms=nan", "device-ms = nan"),
    ):
        assert main(["calibrate", str(plugin), "--budget", "10", *times, *flags.split()]) == 2
        assert expected in capsys.readouterr().err
    free = ["--cloud-ms", "20", "--device-ms", "0", "--rtt", "0", "--bandwidth", "inf", "--json"]
    assert main(["calibrate", str(plugin), "--budget", "30", *free]) == 0
    assert json.loads(capsys.readouterr().out)["usage"] == 1
    picture = plugin / "budget.png"
    assert main(["calibrate", str(plugin), "--budget", "25", *times, "--png", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    before = load_plugin(plugin).threshold
    for flags, expected in (
        (["--budget", "10", *times], "the cloud alone takes 20 ms, so the side network could never be used"),
        (["--usage", "0.5", *times], "leave --budget, --rtt, --bandwidth and --png out"),
        (["--usage", "1.5"], "usage = 1.5"),
        (["--budget", "10"], "give --budget, --rtt and --bandwidth; or --usage alone"),
    ):
        assert main(["calibrate", str(plugin), *flags]) == 2
        assert expected in capsys.readouterr().err and load_plugin(plugin).threshold == before
    assert main(["calibrate", str(plugin), "--usage", "0.25", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["threshold"]
        == load_plugin(plugin).threshold
        == pytest.approx(0.75, abs=0.01)
    )
    save_plugin(plugin, load_plugin(plugin).replace(setting=Setting.S1))
    assert main(["calibrate", str(plugin), "--budget", "30", *times]) == 2
    assert "it has no gate to calibrate" in capsys.readouterr().err


def test_calibrate_counts_what_lazy_memory_sends_of_every_token(plugin, capsys):
    """On a slow line; what the latency model says of the usage that it found is the budget."""
    side, times = load_plugin(plugin).side, ["--cloud-ms", "20", "--device-ms", "5", "--rtt", "15"]
    assert side.config.memory == "lazy"
    assert main(["calibrate", str(plugin), "--budget", "40", "--bandwidth", "0.02", *times, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shape = Shape(side.backbone.embed, side.backbone.layers, len(side.tapped) + 1, side.config.width, 1)
    spa = methods(shape, coding="int8", projected=False, usage=found["usage"], memory="lazy")[0]
    expected = predict(spa, Link(15, 0.02), cloud_ms=20, device_ms=5).total
    assert 0.1 < found["usage"] < 0.9 and found["ms_per_token"] == 40 == pytest.approx(expected, abs=1)


def test_latency_models_a_plugin_as_it_runs(plugin, base, monkeypatch, capsys):
    """With its memory, and its activations projected where the running rows have them; 0 ms is a time like others."""
    from spa_jax import latency, train

    given = []
    fitted = SimpleNamespace(model=SimpleNamespace(decoder=base.config), plugin=load_plugin(plugin))
    monkeypatch.setattr(train, "load_run", lambda folder: fitted)
    monkeypatch.setattr(latency, "compare", lambda ways, links, **times: given.append((ways[0], times)) or [])
    monkeypatch.setattr(latency, "running", lambda *_, **__: [])
    flags = ["--plugin", str(plugin), "--usage", "0.5", "--cloud-ms", "0", "--device-ms", "0", "--json"]
    assert main(["latency", *flags]) == 0
    (spa, times), side = given[0], fitted.plugin.side
    shape = Shape(side.backbone.embed, side.backbone.layers, len(side.tapped) + 1, side.config.width, 1)
    assert spa == methods(shape, projected=False, usage=0.5, memory="lazy")[0]
    assert (times["cloud_ms"], times["device_ms"]) == (0, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--tokens 0", "tokens = 0: expected at least 1"),
        ("--tokens 1 --plugin x", "tokens = 1: expected at least 2"),
        ("--tokens=-3", "tokens = -3"),
        ("--png out/x.xyz", "picture out/x.xyz: expected a file that ends in .png, .pdf, .svg"),
        ("--usage 1.5", "usage = 1.5: expected a share"),
        ("--device-ms=-5", "device-ms = -5.0: expected ms, at least 0"),
    ],
)
def test_latency_refuses(flags, expected, capsys):
    assert main(["latency", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_latency(tmp_path, capsys):
    """Predictions are near what is measured; SPA's network is a small share of the layer-by-layer methods'."""
    picture = tmp_path / "latency.png"
    flags = "--rtt 4 --bandwidth 20 --tokens 10 --cloud-ms 2 --device-ms 1 --json --png"
    assert main(["latency", *flags.split(), str(picture)]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == {"spa", "lst", "lora-split", "adapter-split"} and picture.read_bytes()[:4] == b"\x89PNG"
    assert all(row["error"] < 0.1 for row in rows.values())  # never faster than the link; slower on a busy machine
    assert rows["spa"]["measured"]["total"] < rows["lora-split"]["measured"]["total"]
    assert main(["latency", *flags.split()[:-2], "--rtt", "1,x"]) == 2
    assert "rtt = '1,x': expected numbers" in capsys.readouterr().err


def test_options(tmp_path):
    assert [budget_ms(text) for text in ("40 ms/token", "40ms", "0.5", " 3 ms / token ")] == [40, 40, 0.5, 3]
    assert numbers("5,20", "rtt") == [5, 20]
    for text in ("", "-3", "0", "40 s", "1.2.3"):
        with pytest.raises(ConfigError, match="budget = "):
            budget_ms(text)
    assert read_token(None) is None
    for text in ("", "two words", "schlüssel"):
        (tmp_path / "token").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="expected one word of ASCII"):
            read_token(tmp_path / "token")
    assert not make_token(tmp_path / "token") and (tmp_path / "token").read_text(encoding="utf-8") == "schlüssel"
    with pytest.raises(ConfigError, match="is not there: copy the one"):
        read_token(tmp_path / "new" / "token")
    assert make_token(tmp_path / "new" / "token") and len(read_token(tmp_path / "new" / "token")) == 64
    assert (tmp_path / "new" / "token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="cannot be made"):
        make_token(tmp_path / "token" / "token")


def test_a_device_finds_the_tokenizer_of_a_base_in_a_gguf_file(tmp_path, monkeypatch):
    """The folder of such a model holds no tokenizer.json; the one that is made of the file does."""
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))
    source, file = byte_level_tokenizer(tmp_path / "tokenizer", PRE_TOKENIZERS["smollm"]), tmp_path / "base" / "m.gguf"
    file.parent.mkdir()
    export_gguf(tiny_decoder("llama", vocab_size=405, embed=32).replace(source=source), file, "f32")
    for name, model in (("file", file), ("folder", file.parent)):
        with Run.create_or_resume(tmp_path / name, {"model": str(model)}, kind=FIT) as run:
            run.finish()
        assert tokenizer_fingerprint(cli_device._of_run(run.path, model_folder)) == tokenizer_fingerprint(source)
