"""``spa fit`` in two real processes: the run of one process, also when one of them dies half way."""

import json
import signal

import numpy as np
import pytest

from mlfs_jax.hosts import LOST
from mlfs_jax.run import Run
from spa_jax.cli import main
from spa_jax.plugin import load_plugin
from tests.two_processes import HEARTBEAT, ended, two, wait_for_steps

CLI = "spa_jax.cli"
STEPS = 60


@pytest.fixture(scope="module")
def flags(tiny_lm, echo_task):
    """A start cut out of the base, cached taps, a gate: all that a run does."""
    flags = f"fit --model {tiny_lm} --task {echo_task} --steps {STEPS} --learning-rate 1e-2 --batch-size 8"
    flags += " --max-length 16 --buckets 16 --importance-examples 16 --gate.steps 50 --cache-taps ram --save-every 4"
    return f"{flags} --side.width 8 --side.every 2 --side.heads 2 --side.mlp 6".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """The run of one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*flags, "--out", str(out)]) == 0
    return out


def assert_same_run(one, other):
    histories = [Run.open(run, finished=True).history() for run in (one, other)]
    assert [[row["step"] for row in history] for history in histories] == [list(range(1, STEPS + 1))] * 2
    np.testing.assert_allclose(*([row["loss"] for row in history] for history in histories), rtol=1e-5)
    mine, theirs = load_plugin(one), load_plugin(other)
    for name, weights in mine.side.net.items():
        np.testing.assert_allclose(weights, theirs.side.net[name], atol=2e-4)
    assert mine.base == theirs.base and mine.threshold == pytest.approx(theirs.threshold, abs=1e-3)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_one_is_killed_the_other_says_so_and_the_restarted_job_ends_the_same(flags, alone, cache, tmp_path):
    run = tmp_path / "run"
    command = [*flags, "--out", str(run), "--mesh", "fsdp=2"]
    with two(CLI, command, cache) as processes:
        wait_for_steps(run, 10, processes)
        processes[1].kill()
        code, said = ended(processes[0], timeout=HEARTBEAT + 150)
    assert code == LOST and "the same command in all of them again" in said and "Traceback" not in said, said
    assert not Run.open(run).finished
    with two(CLI, command, cache) as processes:
        (code, said), (other, more) = map(ended, processes)
    assert code == other == 0, (said, more)
    assert "usage" in said and "usage" not in more  # one of them speaks
    assert_same_run(run, alone)


def test_sigterm_to_one_stops_both_after_the_same_step_and_one_process_goes_on(flags, alone, cache, tmp_path):
    run = tmp_path / "run"
    with two(CLI, [*flags, "--out", str(run)], cache) as processes:
        wait_for_steps(run, 10, processes)
        processes[1].send_signal(signal.SIGTERM)
        for code, said in map(ended, processes):
            assert code == 0, said
    steps = len(Run.open(run).history())
    assert 10 <= steps < STEPS and (run / "checkpoints" / str(steps)).is_dir()
    assert main([*flags, "--out", str(run)]) == 0
    assert_same_run(run, alone)


@pytest.mark.parametrize(
    ("flag", "says"),
    [("--per-user", "--user NAME --coordinator none"), ("--cache-taps=disk", "would write one folder")],
)
def test_what_several_processes_cannot_do_is_said(flags, cache, tmp_path, flag, says):
    with two(CLI, [*flags, "--out", str(tmp_path / "run"), flag], cache) as processes:
        both = [*map(ended, processes)]
    for code, said in both:  # the second may find the first one gone before it has looked
        assert (code == 2 and says in said) or code == LOST, said
        assert "Traceback" not in said, said
    assert any(code == 2 for code, _ in both)
    assert not (tmp_path / "run").exists()
