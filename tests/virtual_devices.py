"""Child processes that have several virtual devices on their CPU."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def virtual_devices(count: int) -> dict[str, str]:
    """The environment of such a process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
