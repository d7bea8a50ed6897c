"""Where experiments keep what they measure: one JSON file each, an entry for every finished run."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path


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
