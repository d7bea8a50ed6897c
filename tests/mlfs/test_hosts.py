"""Two real processes on this machine: the run of one process, also when one of them dies half way."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from mlfs_jax.cli import main
from mlfs_jax.errors import CheckpointError, ConfigError
from mlfs_jax.hosts import LOST, Hosts, _loss_in
from mlfs_jax.run import Run
from tests.two_processes import HEARTBEAT, ended, two, wait_for_steps

CLI = "mlfs_jax.cli"


@pytest.fixture(scope="module")
def flags(tiny_hf, mood_task):
    data = f"fit --model {tiny_hf} --task {mood_task} --max-length 12 --buckets 12 --batch-size 16"
    return f"{data} --learning-rate 1e-2 --rank 2 --unroll False --save-every 4 --importance-examples 16".split()


@pytest.fixture(scope="module")
def plain(flags):
    """One stage, no reordering: the least to compile."""
    return [*flags, "--steps", "60", "--no-reorder"]


@pytest.fixture(scope="module")
def alone(plain, tmp_path_factory):
    """The loss curve of one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*plain, "--out", str(out)]) == 0
    return losses(out)


def losses(run: Path) -> np.ndarray:
    history = Run.open(run, finished=True).history()
    assert [row["step"] for row in history] == list(range(1, len(history) + 1))
    return np.concatenate([row["losses"] for row in history])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_the_other_says_so_and_the_restarted_job_ends_with_the_same_losses(
    plain, alone, cache, tmp_path, victim
):
    run = tmp_path / "run"
    with two(CLI, [*plain, "--out", str(run)], cache) as processes:
        wait_for_steps(run, 10, processes)
        processes[victim].kill()
        code, said = ended(processes[1 - victim], timeout=HEARTBEAT + 150)
    assert code == LOST, said
    # whichever of jax's two watchers is first: the one that knows who is gone, or a collective whose socket is closed
    assert f"error: process {victim} of this job" in said or "error: the processes of this job lost each" in said, said
    assert "the same command in all of them again" in said, said
    assert "Traceback" not in said and "stack trace" not in said and "absl::" not in said, said
    assert not Run.open(run).finished
    if victim == 0:
        return  # one restart is enough
    with two(CLI, [*plain, "--out", str(run)], cache) as processes:
        for code, said in map(ended, processes):
            assert code == 0, said
    np.testing.assert_allclose(losses(run), alone, rtol=1e-5)


def test_sigterm_to_one_stops_both_after_the_same_step_and_one_process_goes_on(plain, alone, cache, tmp_path):
    run = tmp_path / "run"
    with two(CLI, [*plain, "--out", str(run)], cache) as processes:
        wait_for_steps(run, 10, processes)
        processes[1].send_signal(signal.SIGTERM)
        for code, said in map(ended, processes):
            assert code == 0, said
    steps = len(Run.open(run).history())
    assert 10 <= steps < 60 and (run / "checkpoints" / str(steps)).is_dir()
    assert main([*plain, "--out", str(run)]) == 0
    np.testing.assert_allclose(losses(run), alone, rtol=1e-5)


def test_stages_order_and_split_weights_on_two_hosts_that_slurm_has_started(flags, cache, tmp_path):
    """Two devices each; all that a run does between its stages; jax finds out who they are."""
    flags = [*flags, *["--steps", "5", "5", "--random-subnets", "0", "--width", "1", "0.5"]]
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "{i}", "SLURM_LOCALID": "{i}"}
    run = tmp_path / "two"
    with two(CLI, [*flags, "--out", str(run), "--mesh", "data=2,fsdp=2"], cache, devices=2, cluster=slurm) as processes:
        (code, said), (other, more) = map(ended, processes)
    assert code == other == 0, (said, more)
    assert "stage1 done" in said and "stage1 done" not in more  # one of them speaks
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    np.testing.assert_allclose(losses(run), losses(tmp_path / "one"), rtol=1e-5)
    orders = [json.loads((tmp_path / name / "order.json").read_text()) for name in ("one", "two")]
    assert orders[0] == orders[1]


def test_a_mistake_of_one_ends_both(plain, cache, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    with two(CLI, [*plain, "--out", str(run)], cache) as processes:
        for code, said in map(ended, processes):
            assert code in (2, LOST) and "error: " in said and "Traceback" not in said, said
            assert "other files (thesis.tex)" in said or code == LOST, said
    assert os.listdir(run) == ["thesis.tex"]


def test_one_that_waits_alone_says_so(plain, cache, tmp_path):
    with two(CLI, [*plain, "--out", str(tmp_path / "run"), "--wait", "3"], cache) as processes:
        processes[0].kill()
        code, said = ended(processes[1], timeout=120)
    assert code == LOST and "not all processes of this job came" in said and "absl::" not in said, said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"coordinator": "a:1"}, "num_processes = None"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"num_processes": 2}, "need host:port"),
        ({"heartbeat": 0}, "heartbeat = 0"),
    ],
)
def test_mistakes_are_named(given, says):
    with pytest.raises(ConfigError, match=says):
        Hosts(**given)


def test_a_lost_process_is_seen_inside_what_failed_by_it():
    inner = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    outer = CheckpointError("step 12 could not be written")
    outer.__cause__ = inner
    assert _loss_in(outer) is inner
    assert _loss_in(CheckpointError("the disk is full")) is None


def test_who_is_one_of_several():
    assert not Hosts().several({}) and not Hosts().several({"SLURM_STEP_NUM_TASKS": "1"})
    assert Hosts().several({"SLURM_STEP_NUM_TASKS": "2"}) and Hosts().several({"OMPI_COMM_WORLD_SIZE": "8"})
    assert Hosts().several({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"})
    assert not Hosts().several({"TPU_WORKER_HOSTNAMES": "10.0.0.1"})
    assert Hosts("auto").several({}) and not Hosts("none").several({"SLURM_STEP_NUM_TASKS": "2"})
