"""Stopping a run politely: the first SIGTERM or Ctrl-C is a request, polled at each step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from mlfs_jax.hosts import reached_stop, several
from mlfs_jax.interrupts import interrupted


class Stopped(Exception):
    """What :meth:`Preemption.check` leaves by."""


class Preemption:
    """Whether somebody asked this process to stop; true from the first SIGTERM or SIGINT on.

    Of several processes, only :meth:`at` finds that out.
    """

    def __init__(self):
        self.signal: str | None = None  # "SIGTERM" or "SIGINT"

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Stopped when this process was asked to, in work that leaves nothing half done."""
        if self:
            raise Stopped

    def announce(self, console: Console) -> None:
        """Say what happened, once all is saved. Ctrl-C goes on as KeyboardInterrupt; SIGTERM was a polite request."""
        console.print(f"stopped by {self.signal}; the same command continues this run.")
        if self.signal == "SIGINT":
            raise KeyboardInterrupt

    def at(self, step: int) -> bool:
        """Whether to stop after this step, to be asked once for each; of several processes all get the same answer."""
        if reached_stop(step):
            self.signal = "SIGTERM"
        return bool(self)


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """The first SIGTERM or Ctrl-C only sets a flag, to be polled at each step; the second really interrupts.

        with preemption() as stop:
            for step in ...:
                ...
                if stop.at(step):
                    checkpoints.save(step, state); break

    Outside the main thread Python handles no signals: the flag then stays false. Of several processes, the one that
    is asked tells the others: jax listens for SIGTERM and finds the step that none of them has passed.
    """
    if interrupted():  # before, and the exception was lost on the way
        raise KeyboardInterrupt
    stop = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def asked(number: int, _frame: Any) -> None:
        restore()
        if several():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.signal = signal.Signals(number).name

    for number in (signal.SIGINT,) if several() else (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.getsignal(number)
        # an ignored signal (nohup-like, background jobs of a shell) stays ignored
        if before[number] != signal.SIG_IGN:
            signal.signal(number, asked)
    try:
        yield stop
    finally:
        restore()
