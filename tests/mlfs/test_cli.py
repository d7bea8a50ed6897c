"""The command line: the whole way of a user, and what it says to a mistake."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlfs_jax import cli, interrupts
from mlfs_jax.cli import COMMANDS, HELP, PRESETS, main
from mlfs_jax.fit_config import FitConfig
from mlfs_jax.palette import FILE as PALETTE
from mlfs_jax.preemption import preemption
from mlfs_jax.registry import ENTRIES
from mlfs_jax.terminal import print_json


def error_of(capsys, *argv) -> str:
    """Run a command that must fail as a user's mistake; its one message."""
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, out, err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return err


def json_of(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_fit_to_info(tiny_run, tiny_hf, tmp_path, capsys):
    """fit has run in the fixture; then palette, export, verify, info, as a user types them."""
    run, out = str(tiny_run), tmp_path / "exported" / "small"
    assert main(["palette", run, "--batch-sizes", "1", "2"]) == 0
    shown = capsys.readouterr().out
    assert "maxnet" in shown and "…" not in shown and "score" in shown
    assert (tiny_run / "palette.png").stat().st_size > 10_000
    rows = json.loads((tiny_run / PALETTE).read_text())["rows"]
    assert rows[0]["name"] == "maxnet" and rows[0]["score"] > 0.8, "the maxnet should have learnt this task"

    assert main(["export", run, "--subnet", "minnet", "--to", str(out)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "mlfs.json"} <= set(os.listdir(out))
    assert "Not measured" not in (out / "README.md").read_text()
    assert main(["verify", str(out), "--against", run]) == 0
    assert "is what" in capsys.readouterr().out
    checks = json_of(capsys, "verify", out, "--against", run)
    assert checks["ok"] and {c["inputs"] for c in checks["checks"]} == {"", "random", "real"}

    described = json_of(capsys, "info", run)
    assert described["kind"] == "run" and described["finished"] and described["steps done"] == 100
    assert [stage["name"] for stage in described["adapters"]] == ["stage0", "stage1", "stage2"]
    assert all(stage["rank"] == 4 and stage["low-rank parameters"] > 0 for stage in described["adapters"])
    assert described["subnets"][0]["accuracy"] == round(rows[0]["score"], 4)
    described = json_of(capsys, "info", out)
    assert described["kind"] == "export" and described["subnet"]["layers"] == [0] and described["run"] == "run"
    parts = described["parameters"]
    assert sum(parts.values()) == 2 * parts["total"] and parts["total"] < rows[0]["params"]
    assert json_of(capsys, "info", tiny_hf)["config"]["layers"] == 2
    for thing in (run, out, tiny_hf, "wiki"):
        assert main(["info", str(thing)]) == 0
        assert capsys.readouterr().out.startswith("kind ")

    (out / "mlfs_export.json").write_text("{oops")
    assert "is damaged" in error_of(capsys, "info", out)
    weights = out / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-2] ^= 0x40  # the exponent of the last number
    weights.write_bytes(damaged)
    assert main(["verify", str(out), "--against", run]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "is NOT what" in shown


def test_fit_again_does_nothing_and_another_run_is_refused(tiny_run, fit_flags, capsys):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    assert main([*fit_flags, "--out", str(tiny_run)]) == 0
    assert (tiny_run / "metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    said = error_of(capsys, *fit_flags, "--seed", 1, "--out", tiny_run)
    assert "another configuration" in said and "seed: 0 in the folder, 1 now" in said


def test_palette_json_is_pure_and_all(tiny_run, capsys):
    palette = json_of(capsys, "palette", tiny_run, "--all", "--batch-sizes", "1", "--length", "6")
    assert len(palette["rows"]) == 4 and palette["length"] == 6
    assert "exclude each other" in error_of(capsys, "palette", tiny_run, "--all", "--subnets", "maxnet")


def test_peft(tiny_run, tmp_path, capsys):
    assert main(["export", str(tiny_run), "--peft", "--to", str(tmp_path / "adapter")]) == 0
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert "rank 12" in capsys.readouterr().out  # three stages of 4, side by side
    said = error_of(capsys, "export", tiny_run, "--peft", "--subnet", "minnet", "--to", tmp_path / "b")
    assert "whole model" in said


def test_mistakes(tiny_run, tiny_hf, mood_task, fit_flags, tmp_path, capsys):
    fit = ("fit", "--out", tmp_path / "new")
    assert "did you mean 'palette'" in error_of(capsys, "pallete")
    assert "did you mean 'minilm-l6'" in error_of(capsys, "fetch", "minilm-16")
    assert "did you mean 'minilm-l6'" in error_of(capsys, *fit, "--model", "minilm", "--task", mood_task)
    assert "did you mean 'wiki-topic'" in error_of(capsys, *fit, "--model", tiny_hf, "--task", "wiki-topics")
    assert "did you mean 'demo'" in error_of(capsys, *fit, "--model", tiny_hf, "--task", mood_task, "--preset", "dmeo")
    assert "unknown preset" in error_of(capsys, *fit, "--model", tiny_hf, "--task", mood_task, "--preset=x")
    assert "no run folder" in error_of(capsys, "palette", tmp_path / "none")
    assert "holds no run" in error_of(capsys, "palette", tmp_path)
    assert "did you mean 'maxnet'" in error_of(capsys, "export", tiny_run, "--subnet", "maxnt", "--to", tmp_path / "a")
    sizes = ("export", tiny_run, "--subnet", "depth=2,mlp=15", "--to", tmp_path / "a")
    assert "choose from" in error_of(capsys, *sizes)
    assert "--subnet is missing" in error_of(capsys, "export", tiny_run, "--to", tmp_path / "a")
    assert "is a folder; leave --peft out" in error_of(
        capsys, "export", tiny_run, "--peft", "--to", tmp_path / "a.gguf"
    )
    assert "heads is there twice" in error_of(capsys, *sizes[:3], "heads=2,heads=4", *sizes[4:])
    assert "is no model: expected a folder" in error_of(capsys, "info", tiny_hf / "config.json")
    typed = ("--subnet", "maxnet", "--gguf-type", "q8_0")
    assert "no file that ends in .gguf" in error_of(capsys, "export", tiny_run, "--to", tmp_path / "a", *typed)
    assert not (tmp_path / "a").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    assert "choose another" in error_of(capsys, "export", tiny_run, "--subnet", "maxnet", "--to", foreign)
    assert "other files" in error_of(capsys, *fit_flags, "--out", foreign)
    assert os.listdir(foreign) == ["notes.txt"]
    assert "has no mlfs.json" in error_of(capsys, "verify", tiny_hf, "--against", tiny_run)
    assert "unknown model" in error_of(capsys, "info", tmp_path / "nothing")
    (tiny_run / "result.json").unlink()
    assert "not finished" in error_of(capsys, "palette", tiny_run)


def test_help(capsys):
    assert main(["--help"]) == 0 and capsys.readouterr().out == HELP
    assert main([]) == 2
    assert len(HELP.splitlines()) <= 40 and max(map(len, HELP.splitlines())) <= 80, "one screen"
    for command in COMMANDS:
        assert f"  {command} " in HELP and f"mlfs {command} " in HELP
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and f"usage: mlfs {command}" in shown


def test_completion(capsys):
    """A script for the shell that knows every command and its flags."""
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "complete -F" in script and all(repr(command) in script for command in COMMANDS)
    assert "--distill.alpha" in script and "--no-json" not in script
    assert "unknown shell 'fish'" in error_of(capsys, "--print-completion", "fish")


def test_help_of_fit_shows_every_field_and_the_presets_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--preset", "demo", "--help"])
    shown = capsys.readouterr().out
    assert ".gguf" in shown and ".txt" in shown
    for field in FitConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in shown, field
    assert "(default: {} {} {})".format(*PRESETS["demo"]["steps"]) in " ".join(shown.split())


def test_flags_override_the_preset(monkeypatch, tmp_path):
    """What is not given comes from the preset, what is given wins, wherever --preset stands."""
    seen = []
    monkeypatch.setattr("mlfs_jax.train.fit", lambda config, out, mesh: seen.append(config))
    given = ["fit", "--model", "m", "--task", "t", "--out", str(tmp_path), "--rank", "3"]
    assert main([*given, "--preset", "demo", "--steps", "7", "8", "9"]) == 0
    assert main([*given, "--preset=full", "--distill.tau", "3"]) == 0
    demo, full = seen
    assert demo.steps == (7, 8, 9) and demo.rank == 3 and demo.max_length == PRESETS["demo"]["max_length"]
    assert full == FitConfig("m", "t", rank=3, distill=type(full.distill)(tau=3.0))
    for preset in PRESETS.values():
        FitConfig("m", "t", **preset)


def test_fetch_lists_the_catalogue(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path))
    assert main(["fetch"]) == 0
    shown = capsys.readouterr().out
    assert all(entry.name in shown and entry.licence in shown for entry in ENTRIES)
    listed = json_of(capsys, "fetch")
    assert {entry["name"] for entry in listed} == {entry.name for entry in ENTRIES}
    assert not any(entry["cached"] for entry in listed)
    described = json_of(capsys, "info", "minilm-l6")
    assert described["licence"] == "Apache-2.0" and "not in the cache" in described["folder"]


def test_interrupt(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    assert main(["info", "wiki"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_that_was_lost_ends_the_command_later(monkeypatch, tmp_path):
    """Python drops an exception in a callback of the garbage collector, where Ctrl-C may find it."""
    monkeypatch.setattr(interrupts, "_asked", False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupts.remember_interrupts()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert interrupts.interrupted()
        with pytest.raises(KeyboardInterrupt), preemption():
            raise AssertionError("it goes on")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_in_a_callback_that_drops_it_comes_again(monkeypatch):
    monkeypatch.setattr(interrupts, "_asked", False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # as it is now, at the end
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def called(phase, _):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    try:
        interrupts.remember_interrupts()
        gc.callbacks.append(called)
        gc.collect()
        gc.callbacks.remove(called)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(2)
    finally:
        signal.signal(signal.SIGINT, before)


def test_json_has_no_nan(capsys):
    print_json({"score": [float("nan"), (1.5, float("-inf"))], "n": 3})
    assert json.loads(capsys.readouterr().out) == {"score": [None, [1.5, None]], "n": 3}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stopped_fit_says_so_and_goes_on(fit_flags, tmp_path, number, code):
    """A real process, stopped in its first stage: all is saved, and the same command finishes the run."""
    command = [sys.executable, "-m", "mlfs_jax.cli", *fit_flags, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lock = tmp_path / "run" / ".lock"
    while process.poll() is None and not lock.exists():
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code and "the same command continues" in out, out
    assert main([*fit_flags, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())
