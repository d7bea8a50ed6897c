"""Two real processes of one job on this machine."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.virtual_devices import child

HEARTBEAT = 5


@contextlib.contextmanager
def two(
    module: str, arguments: Sequence[str], cache: Path, devices: int = 1, cluster: dict | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Two processes of one command; ``cluster``: environment that says who they are, instead of flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # programs are compiled once: process 0 leaves them to the next start
    env = child(devices) | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    each = []
    for i in range(2):
        command = [sys.executable, "-m", module, *arguments, "--heartbeat", str(HEARTBEAT)]
        if cluster is None:
            command += f"--coordinator 127.0.0.1:{port} --num-processes 2 --process-id {i}".split()
        mine = {name: value.format(i=i) for name, value in (cluster or {}).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        each.append(subprocess.Popen(command, env=env | mine, **pipes))
    try:
        yield each
    finally:
        for process in each:
            process.kill()


def ended(process: subprocess.Popen, timeout: float = 250) -> tuple[int, str]:
    """Its exit code, and all that it said."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def wait_for_steps(run: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    log = run / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < steps:
        assert all(p.poll() is None for p in processes), [ended(p) for p in processes]
        time.sleep(0.02)
