"""Where experiments keep what they measure: one JSON file each, an entry for every finished run."""

from __future__ import annotations

import fcntl
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def check_names(kind: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Before anything is run.

    Raises:
        SystemExit: one that is asked for is not known; it says which, and what is like it.
    """
    from mlfs_jax.errors import unknown

    known = list(known)
    for name in asked:
        if name not in known:
            raise SystemExit(f"error: {unknown(kind, name, known)}")


def run_key(key: str, *others: str | None) -> str:
    """``key``, which begins with the preset; behind "other/" and what a run has instead of the preset's, if anything.

    The pages show runs of the presets as they are: another model's is kept beside them.
    """
    said = [one.replace("/", "-") for one in others if one is not None]
    return "/".join(["other", *said, key]) if said else key


def load_results(file: Path) -> dict:
    """Key -> result; empty when there is no file yet."""
    return json.loads(file.read_text()) if file.exists() else {}


def save_result(file: Path, key: str, result: dict) -> None:
    """Add one result to the file; several processes may do so at once."""
    file.parent.mkdir(exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(dict(sorted((load_results(file) | {key: result}).items())), indent=1))
        fresh.replace(file)


def final_score(scores: dict[str, dict[str, float]]) -> float:
    """The task's metric, of the test split; of the validation split where the test labels are secret (GLUE)."""
    of = scores["test"] if "test" in scores else scores["validation"]
    return next(value for name, value in of.items() if name != "loss")


def mean_and_spread(values: Sequence[float], show: Callable[[float], str] = "{:.1f}".format) -> str:
    """ "12.3 ± 0.4": mean and standard deviation over seeds; of a single one, itself."""
    spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
    return show(statistics.mean(values)) + spread
