"""The mistakes a user can make, as exceptions; `except MLFSError` catches them all."""

import difflib
from collections.abc import Iterable


class MLFSError(Exception):
    """Something the user can put right; the message says what was given, what was expected and what to do."""


class UnknownNameError(MLFSError, ValueError):
    """A model, dataset, task or subnet name that nothing is registered under."""


class DownloadError(MLFSError):
    """A download that could not be made (no network) or whose content is not what it should be (sha256)."""


class DataError(MLFSError, ValueError):
    """A data file or data set that cannot be used: empty, not UTF-8, a missing column, a bad label."""


class CheckpointError(MLFSError, ValueError):
    """A checkpoint that does not fit the model: a missing, unexpected, duplicate or mis-shaped tensor."""


class ConfigError(MLFSError, ValueError):
    """A configuration that cannot be built or trained: heads not divisible, a bad setting."""


class SubnetError(MLFSError, ValueError):
    """A subnet that the space does not contain or that the model cannot express."""


class RunError(MLFSError):
    """A run directory that cannot be used: it holds another run, is incomplete, or could not be written."""


class HostsError(MLFSError):
    """The processes of one job did not find each other, lost each other, or disagree about what they read."""


class SessionError(MLFSError, ValueError):
    """A cache of generated text that is given to another network than the one that filled it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown `name` of a `kind` ("model", "task"), offering the nearest `known` names."""
    known = sorted(known)
    lower = {k.lower(): k for k in known}
    near = [lower[k] for k in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "there is nothing with a similar name."
    return UnknownNameError(f"unknown {kind} {name!r}: {hint} Known: {', '.join(known) or 'none'}.")


def some(items: Iterable[str]) -> str:
    """The first of many, for a message."""
    items = list(items)
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def first_line(error: BaseException) -> str:
    """What another library's error is, without its many lines."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
