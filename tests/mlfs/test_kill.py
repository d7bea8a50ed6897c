"""kill -9 at any moment: the restarted run has, in the end, the loss curve of one that nobody disturbed, bit by bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mlfs.test_train import assert_same_run

ROOT = Path(__file__).resolve().parents[2]
STAGES = {2: "--steps 40 --no-reorder", 20: "--steps 40 15 15 --width 1 0.5 --depth 1 0.5 --importance-examples 16"}
"""How often to kill -> what."""


@pytest.fixture(scope="module")
def start(tiny_hf, mood_task, tmp_path_factory):
    """Starts the command on a folder, in a process of its own: ``start(folder, stages)``."""
    cache = tmp_path_factory.mktemp("xla")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    flags = f"fit --model {tiny_hf} --task {mood_task} --max-length 12 --buckets 12 --batch-size 8 --rank 2"
    flags += " --save-every 1 --random-subnets 0 --unroll False"

    def start(run: Path, stages: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mlfs_jax.cli", *flags.split(), *stages.split(), "--out", str(run)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def finish(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said


def kill_at_a_random_moment(process: subprocess.Popen, run: Path, rng: random.Random, most: float) -> bool:
    """Half within ``most`` seconds of training, half anywhere from the start on; False: it had ended by then."""
    log = run / "metrics.jsonl"
    size = lambda: log.stat().st_size if log.exists() else 0  # noqa: E731
    if rng.random() < 0.5:
        before = size()
        while process.poll() is None and size() <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, most))
    else:
        end = time.monotonic() + rng.uniform(0, 12)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_random_moments(start, tmp_path, kills):
    undisturbed, stages = tmp_path / "whole", STAGES[kills]
    finish(start(undisturbed, stages))
    rng, done, in_a_save, runs = random.Random(kills), 0, 0, 0
    while done < kills:
        runs += 1
        run = tmp_path / f"run{runs}"
        while done < kills and not (run / "result.json").exists():
            killed = kill_at_a_random_moment(start(run, stages), run, rng, most=1.5)
            done += killed
            in_a_save += killed and any(run.glob("checkpoints/*orbax-checkpoint-tmp*"))
        finish(start(run, stages))
        assert_same_run(run, undisturbed)
    print(f"{done} kills, {in_a_save} of them during a save, {runs} runs")
    assert kills < 20 or in_a_save > 0
