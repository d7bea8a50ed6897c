"""The run directory: resumes what is the same, refuses what is not, and loses nothing when killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mlfs_jax.errors import RunError
from mlfs_jax.preemption import preemption
from mlfs_jax.run import Run

CONFIG = {"model": "bert-tiny", "stages": [{"steps": 10}, {"steps": 20}], "optim": {"lr": 1e-3, "betas": (0.9, 0.999)}}


def changed(**optim) -> dict:
    return {**CONFIG, "optim": {**CONFIG["optim"], **optim}}


def test_a_new_folder_is_made_and_an_equal_config_resumes(tmp_path):
    path = tmp_path / "runs" / "demo"
    with Run.create_or_resume(path, CONFIG) as run:
        assert not run.resumed and not run.finished
        created = run.created
    info = json.loads((path / "run.json").read_text())
    assert info["config"]["optim"]["betas"] == [0.9, 0.999] and info["format"] == 1
    with Run.create_or_resume(path, CONFIG) as run:  # a tuple and JSON's list are the same
        assert run.resumed and run.created == created
    assert Run.open(path).config == info["config"]


def test_a_folder_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Run.create_or_resume("~/runs/demo", CONFIG).close()
    assert (tmp_path / "runs" / "demo" / "run.json").is_file()
    assert Run.open("~/runs/demo").config["model"] == "bert-tiny"


def test_another_config_is_refused_with_the_differing_keys(tmp_path):
    Run.create_or_resume(tmp_path / "r", CONFIG).close()
    other = {**changed(lr=2e-3, decay=0.1), "stages": [{"steps": 10}]}
    del other["model"]
    with pytest.raises(RunError) as error:
        Run.create_or_resume(tmp_path / "r", other)
    text = str(error.value)
    assert "  optim.lr: 0.001 in the folder, 0.002 now\n" in text
    assert "  optim.decay: (not set) in the folder, 0.1 now\n" in text
    assert '  model: "bert-tiny" in the folder, (not set) now\n' in text
    assert '  stages: [{"steps": 10}, {"steps": 20}] in the folder, [{"steps": 10}] now\n' in text
    assert "betas" not in text and "--out" in text and "delete" in text
    Run.create_or_resume(tmp_path / "r", CONFIG).close()  # the refusal let go of the lock


def test_folders_that_are_no_run_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"other files \(thesis.tex\).*--out"):
        Run.create_or_resume(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        Run.create_or_resume(tmp_path / "thesis.tex", CONFIG)
    with pytest.raises(RunError, match="holds no run"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="no run folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="JSON"):
        Run.create_or_resume(tmp_path / "r", {"a": object()})


def test_an_empty_folder_and_one_of_a_start_cut_short_are_new(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "run.json.tmp-123").write_text('{"conf')
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        assert not run.resumed


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": 1}', '{"format": 1, "config": 3}', "\xff"])
def test_a_damaged_run_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    for use in (lambda: Run.open(tmp_path), lambda: Run.create_or_resume(tmp_path, CONFIG)):
        with pytest.raises(RunError, match=r"run.json is damaged"):
            use()


def test_a_newer_run_is_refused_by_name(tmp_path):
    (tmp_path / "run.json").write_text('{"format": 2, "config": {}}')
    with pytest.raises(RunError, match=r"run format 2.*reads 1"):
        Run.open(tmp_path)


def test_the_log_is_exact_and_rewinds_to_the_restored_step(tmp_path):
    third = np.float32(1) / np.float32(3)
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        assert run.history() == []
        for step in range(1, 7):
            run.log(step=step, loss=third * step, stage="max", heads=np.arange(2))
            assert len(Run.open(tmp_path).history()) == step  # flushed
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        run.log(step=7, loss=float("nan"))
        run.rewind(4)
        for step in (5, 6):
            run.log(step=step, loss=0)
        history = run.history()
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [np.float32(row["loss"]) for row in history] == [third, third * 2, third * 3, third * 4, 0, 0]
    assert history[0]["heads"] == [0, 1] and history[0]["stage"] == "max"
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        run.rewind(0)
        assert run.history() == []


def test_a_torn_last_line_is_dropped_and_a_damaged_one_in_the_middle_named(tmp_path):
    log = tmp_path / "metrics.jsonl"
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        run.log(step=1, loss=1.0)
        run.log(step=2, loss=2.0)
    whole = log.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):  # every place where the second line can be torn
        log.write_bytes(whole[:cut])
        assert [row["step"] for row in Run.open(tmp_path).history()] == [1]
        with Run.create_or_resume(tmp_path, CONFIG) as run:
            run.log(step=3, loss=3.0)
            assert [row["step"] for row in run.history()] == [1, 3]
    log.write_bytes(b"{broken\n" + whole)
    with pytest.raises(RunError, match=r"metrics.jsonl, line 1 is damaged"):
        Run.open(tmp_path).history()


def test_json_files_are_written_whole_and_finish_marks_the_end(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="holds no run"):
        Run.open(tmp_path)
    with Run.create_or_resume(tmp_path, CONFIG) as run:
        with pytest.raises(RunError, match="not finished"):
            Run.open(tmp_path, finished=True)
        with pytest.raises(RunError, match=r"has no palette.json"):
            run.read_json("palette")
        run.write_json("palette", {"quarter": (1, 2)})
        assert run.read_json("palette.json") == {"quarter": [1, 2]}

        def no_space(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(RunError, match="disk is full"):
            run.write_json("palette", {"quarter": 3})
        monkeypatch.undo()
        assert run.read_json("palette") == {"quarter": [1, 2]}
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
        with pytest.raises(RunError, match="own file"):
            run.write_json("run", {})
        run.finish(accuracy=0.5)
    reader = Run.open(tmp_path, finished=True)
    assert reader.read_json("result") == {"accuracy": 0.5}
    for write in (lambda: reader.log(step=1), lambda: reader.write_json("a", 1), lambda: reader.rewind(0)):
        with pytest.raises(RunError, match="open for reading"):
            write()
    (tmp_path / "palette.json").write_text("{")
    with pytest.raises(RunError, match=r"palette.json is damaged"):
        reader.read_json("palette")


def test_two_processes_do_not_train_in_one_folder_and_the_lock_goes_with_its_process(tmp_path):
    script = (
        "import sys, time; from mlfs_jax.run import Run; run = Run.create_or_resume(sys.argv[1], {});"
        "print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=rf"another process \(pid {child.pid}\) is training"):
            Run.create_or_resume(tmp_path, {})
        assert Run.open(tmp_path).config == {}  # reading needs no lock
    finally:
        child.kill()
        child.communicate()
    with Run.create_or_resume(tmp_path, {}) as run:
        assert run.resumed
        with pytest.raises(RunError, match="another process"):  # nor twice in one process
            Run.create_or_resume(tmp_path, {})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_leaves_the_handlers_as_they_were(number):
    before = signal.getsignal(number)
    with preemption() as stop:
        assert not stop and stop.signal is None
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number.name
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), preemption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_outside_the_main_thread_the_flag_stays_false():
    seen = []

    def work():
        with preemption() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


TRAINER = """
import sys, time
from mlfs_jax.preemption import preemption
from mlfs_jax.run import Run
with Run.create_or_resume(sys.argv[1], {"seed": 0}) as run, preemption() as stop:
    start = run.read_json("saved")["step"] if (run.path / "saved.json").exists() else 0
    run.rewind(start)
    print("ready", flush=True)
    for step in range(start + 1, 1_000_000):
        run.log(step=step, loss=1 / step)
        time.sleep(0.001)
        if stop and sys.argv[2] == "polls":
            run.write_json("saved", {"step": step})
            sys.exit(0)
"""


def trainer(path, mode: str) -> subprocess.Popen:
    child = subprocess.Popen([sys.executable, "-c", TRAINER, str(path), mode], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return child


def test_sigterm_saves_and_exits_0_and_the_curve_continues_with_no_step_twice(tmp_path):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        child = trainer(tmp_path, "polls")
        child.send_signal(number)
        child.communicate(timeout=20)
        assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        history = Run.open(tmp_path).history()
        assert [row["step"] for row in history] == list(range(1, len(history) + 1))
        assert all(row["loss"] == 1 / row["step"] for row in history)
        if number != signal.SIGKILL:
            assert len(history) == Run.open(tmp_path).read_json("saved")["step"] > 3


def test_a_second_sigterm_ends_a_process_that_does_not_poll(tmp_path):
    child = trainer(tmp_path, "deaf")
    child.terminate()
    time.sleep(0.2)
    assert child.poll() is None
    child.terminate()
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGTERM
