"""The environment of a child process that has several virtual devices on its CPU."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def virtual_devices(count: int) -> dict[str, str]:
    """For ``subprocess``.

    A device that waits in a collective holds a thread of XLA's pool, several when collectives are independent of each
    other; with a thread for each of two cores, two devices can wait for good. NPROC is the size of the pool.
    """
    mine = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    return os.environ | mine | {"NPROC": str(8 * count)}
