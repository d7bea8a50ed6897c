"""Ctrl-C on a command line. Python drops a KeyboardInterrupt that comes in a callback of the garbage collector, and jax
has one: here it is asked again then, and remembered, so that a command can also act on it later."""

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

DEAF = ("_xla_gc_callback", "__del__")
"""Functions whose exceptions Python drops."""

_asked = False


def remember_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as ever, and :func:`interrupted` knows."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    while frame is not None:
        if frame.f_code.co_name in DEAF:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, which has a way of its own with Ctrl-C, but only where nobody has set another."""
    before = signal.getsignal(signal.SIGINT)
    if before is _remember:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return asyncio.run(main)
    finally:
        if before is _remember:
            signal.signal(signal.SIGINT, before)


def interrupted() -> bool:
    """Whether Ctrl-C came since :func:`remember_interrupts`."""
    return _asked
