"""What becomes of memory that a training step has freed: on a CPU, the next step wants it again."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
"""Of glibc's ``malloc.h``: the parameters of ``mallopt``."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation; returns whether that was done.

    On a CPU, XLA asks for a step's workspace (hundreds of MB) anew each time. glibc takes so large a block from the
    system and gives it back at once, and the system clears it anew, page by page; what that costs, measures
    ``experiments/bench_lora.py``. After this call there is one heap, that does not shrink.

    To be called before jax starts its threads, as ``mlfs fit`` and ``spa fit`` do. Does nothing where an accelerator
    does the work, under another C library, or when GLIBC_TUNABLES is set: that is somebody's own choice.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ or not _on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(parameter, value) for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    )


def _on_cpu() -> bool:
    """Whether jax will run on the CPU, asked without starting it."""
    if wanted := os.environ.get("JAX_PLATFORMS"):
        return wanted == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
