"""Child processes that have several virtual devices on their CPU."""

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def child(devices: int) -> dict[str, str]:
    """The environment of a process with so many devices."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def virtual_devices(count: int) -> dict[str, str]:
    """The environment of a process whose devices are all of a mesh.

    XLA's CPU runtime starts whatever is ready, collectives too: two devices that begin with different ones wait for
    each other for ever. With the quick compiles of conftest.py that took 2 of 5 runs of a training step on a busy
    machine, and none where XLA does not order a program's operations for being run side by side. (Processes that meet
    through Gloo fail with that order.)
    """
    env = child(count)
    if version("jaxlib").startswith("0.10."):  # others may not know the flag, and XLA ends the process then
        env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    else:
        env.pop("XLA_FLAGS", None)
    return env
