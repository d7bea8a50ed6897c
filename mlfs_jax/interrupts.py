"""Ctrl-C on a command line. A KeyboardInterrupt that comes while a library's callback runs is dropped by Python; what
was asked is remembered here, so that a command can act on it later."""

import signal
import threading

_asked = False


def remember_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as ever, and :func:`interrupted` knows."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)


def _remember(_number, _frame) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether Ctrl-C came since :func:`remember_interrupts`."""
    return _asked
