"""Ctrl-C on a command line. Python drops a KeyboardInterrupt that comes in a callback of the garbage collector (jax has
one) or of a weak reference: here it then comes again, and is remembered, so that a command can also act on it later."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_asked = False


def remember_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as ever, and :func:`interrupted` knows."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)
        sys.unraisablehook = _dropped


def _remember(_number, _frame) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def _dropped(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        with contextlib.suppress(RuntimeError):  # there are no new threads as Python ends
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


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
