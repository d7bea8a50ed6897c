"""Other libraries to measure against: each in a virtual environment of its own, run as a worker that steps when asked.

A worker is a script in ``experiments/peers/`` that says ``{"ready": ...}`` and then, for every line of JSON that it
reads, does one step and answers with one line of JSON: what it cost. So both sides of a benchmark take turns, pinned
to the same cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pictures import bars
from rich.console import Console
from rich.table import Table

from mlfs_jax.timing import device_name

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlfs_jax" / "peers"


def environment(name: str, *installs: tuple[str, ...]) -> Path:
    """The Python of a virtual environment, made when it is missing, with these pip arguments installed, a call each."""
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps(installs)
    if not done.exists() or done.read_text() != wanted:
        Console(stderr=True).print(f"making {folder}: {'; '.join(' '.join(install) for install in installs)}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for install in installs:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *install], check=True)
        done.write_text(wanted)
    return python


class Worker:
    """A running worker; a context manager that ends it.

    Args:
        python: of its environment (:func:`environment`, or ``sys.executable`` for our own side).
        script: file name in ``experiments/peers/``.
        setup: what it reads first.
        settings: environment variables of its own.
    """

    def __init__(self, python: Path | str, script: str, setup: dict, **settings: str):
        command, env = [str(python), str(HERE / "peers" / script), json.dumps(setup)], os.environ | settings
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def step(self, **task) -> dict:
        """One step; the worker's answer, e.g. ``{"cpu": seconds, "loss": ...}``."""
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # else what a library of the worker has to say
                return json.loads(line)
        raise SystemExit(f"{self.process.args[1]} ended (status {self.process.wait()}): see what it said above.")


def take_turns(sides: Mapping[str, Worker], tasks: Sequence[dict]) -> dict[str, dict]:
    """CPU-seconds of every side, round after round in a new order: the median, and what it is of the first side's."""
    rng, seconds = np.random.default_rng(0), {name: [] for name in sides}
    for task in tasks:
        for name in rng.permutation(list(sides)).tolist():
            seconds[name].append(sides[name].step(**task)["cpu"])
    medians = {name: float(np.median(spent)) for name, spent in seconds.items()}
    whole = next(iter(medians.values()))
    return {name: {"cpu_seconds": m, "share": m / whole, "rounds": seconds[name]} for name, m in medians.items()}


def report(file: Path, title: str, options: object, results: Mapping[str, dict[str, dict]]) -> None:
    """A table of ``take_turns`` for each case (of a number: vocabulary), and the JSON and bar chart beside it."""
    table = Table(title=title)
    for column in ("case", "side", "CPU-s", "share"):
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    for case, rows in results.items():
        for name, row in rows.items():
            table.add_row(_said(case), name, f"{row['cpu_seconds']:.3f}", f"{row['share']:.2f}")
    Console().print(table)
    names = next(iter(results.values()))  # the peer's first
    shares = {name: {_said(case): rows[name]["share"] for case, rows in results.items()} for name in names}
    bars(file, shares, f"CPU-seconds, share of {next(iter(names))}'s")
    file.write_text(json.dumps({"options": asdict(options), "cpu": device_name(), "results": results}, indent=1))


def _said(case: str) -> str:
    return f"vocabulary {int(case):,}" if case.isdecimal() else case


def pin(cores: int = 1) -> None:
    """Keep this process and the workers it starts on the same few cores, with as many threads."""
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, chosen)
    os.environ |= {"OMP_NUM_THREADS": str(len(chosen)), "MKL_NUM_THREADS": str(len(chosen))}
