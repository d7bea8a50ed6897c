"""The run directory: what was asked for, the learning curve, the results, and who is writing to it.

runs/demo/
    run.json        the configuration, the library's version, when it was made
    metrics.jsonl   one line per logged step
    result.json     there once the run is finished
    checkpoints/    see checkpoint.py
    .lock           held (flock) by the process that trains; it goes with the process, however that ends
"""

import contextlib
import datetime
import errno
import fcntl
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.hosts import by_writer, same_everywhere

T = TypeVar("T")

FORMAT = 1
_RUN, _METRICS, _RESULT, _LOCK = "run.json", "metrics.jsonl", "result.json", ".lock"
_TMP = ".tmp-"


class Run:
    """One run's folder. Made by `create_or_resume` (to train: locked, writable) or `open` (to read).

    with Run.create_or_resume("runs/demo", config) as run, preemption() as stop:
        run.rewind(step)                      # the step of the restored checkpoint, 0 if there is none
        run.log(step=step, loss=loss)
        run.finish(accuracy=0.91)
    """

    path: Path
    config: dict
    resumed: bool  # the folder held this run already

    def __init__(self, path: Path, info: dict, *, lock: int | None, resumed: bool, follows: bool = False):
        self.path, self.config, self.resumed = path, info["config"], resumed
        self.kind: str | None = info.get("kind")  # None: a run of old, or of one who does not say
        self.version, self.created = info.get("version", "unknown"), info.get("created", "unknown")
        self._lock, self._follows = lock, follows
        self._log: io.FileIO | None = None

    @classmethod
    def create_or_resume(cls, path: str | os.PathLike, config: dict, *, kind: str | None = None) -> "Run":
        """Starts a run in a new (or empty) folder, or takes up the one that is there.

        Of several processes (see :mod:`mlfs_jax.hosts`) all call this. Process 0 writes; in the others `log`,
        `rewind`, `write_json` and `finish` do nothing.

        Args:
          config: what must agree for the curve to continue, as JSON can hold it. Leave out what may change
            between two starts (the device, how often to log).
          kind: what made it, for those who open it.

        Raises:
          RunError: the folder holds a run with another config or other files, or another process trains there.
        """
        path, config = Path(path).expanduser().absolute(), _as_json(config)
        run = by_writer(lambda: cls._create_or_resume(path, config, kind))
        if run is None:
            info = _read_info(path)
            _check_same(path, info["config"], config)
            run = cls(path, info, lock=None, resumed=True, follows=True)
        same_everywhere(f"the run in {path}", run.created)
        return run

    @classmethod
    def _create_or_resume(cls, path: Path, config: dict, kind: str | None) -> "Run":
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file: give --out the name of a folder")
        if path.is_dir() and not (path / _RUN).exists() and _foreign(path):
            raise RunError(
                f"{path} holds other files ({', '.join(_foreign(path)[:3])}) and no run (no {_RUN}): "
                f"give --out another folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"cannot make the run folder {path}: {e.strerror}") from e
        lock = _take_lock(path)
        try:
            resumed = (path / _RUN).exists()
            if resumed:
                info = _read_info(path)
                _check_same(path, info["config"], config)
            else:
                version = getattr(sys.modules.get("mlfs_jax"), "__version__", "unknown")
                created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
                info = {"format": FORMAT, "version": version, "created": created, "config": config}
                if kind is not None:
                    info["kind"] = kind
                write_json(path / _RUN, info)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, info, lock=lock, resumed=resumed)

    @classmethod
    def open(cls, path: str | os.PathLike, *, finished: bool = False, kinds: tuple[str, ...] = ()) -> "Run":
        """Opens a run to read it, also while another process trains in it.

        Args:
          finished: refuse a run that has not come to its end.
          kinds: refuse a run that something else has made, if it says so; empty: take any.

        Raises:
          RunError: there is no such folder, it holds no run, one of another kind, or (with `finished`) one without a
            result.
        """
        path, made = Path(path).expanduser().absolute(), kinds[0] if kinds else "mlfs fit"
        if not path.is_dir():
            raise RunError(f"there is no run folder {path}: give the folder that `{made} --out` wrote")
        run = cls(path, _read_info(path), lock=None, resumed=True)
        if kinds and run.kind not in (None, *kinds):
            raise RunError(f"{path} is a run of `{run.kind}`: expected one of `{'` or `'.join(kinds)}`.")
        run.kind = run.kind or made
        if finished and not run.finished:
            raise RunError(f"the run in {path} is not finished: run the same `{run.kind}` again to continue it")
        return run

    def config_as(self, cls: type[T], **parts: type) -> T:
        """The configuration as the dataclass that it was; ``parts`` are those of its fields that are such themselves.

        Raises RunError where the folder is of another version, or damaged.
        """
        try:
            saved: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in self.config.items() if k != "data"
            }
            return cls(**saved | {name: part(**saved[name]) for name, part in parts.items()})
        except (TypeError, KeyError, ConfigError) as e:
            raise RunError(
                f"{self.path} holds no run of {self.kind} that this version reads ({e}): it is damaged, "
                f"of another program, or of version {self.version}."
            ) from e

    @property
    def checkpoints(self) -> Path:
        """The folder for `Checkpoints`."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / _RESULT).exists()

    def finish(self, **result: Any) -> None:
        """Writes result.json: the run has come to its end."""
        self.write_json(_RESULT, result)

    def log(self, *, step: int, **values: Any) -> None:
        """Adds one line to metrics.jsonl: numbers (jax and numpy scalars too, exactly), strings, lists."""
        if not self._writes():
            return
        line = json.dumps({"step": int(step), **{k: _plain(v) for k, v in values.items()}}) + "\n"
        try:
            if self._log is None:
                self._drop_torn_line()
                self._log = (self.path / _METRICS).open("ab", buffering=0)
            left = memoryview(line.encode())
            while left:
                left = left[self._log.write(left) :]
        except OSError as e:
            self._close_log()  # half a line may be there: the next log() drops it
            raise _write_error(self.path / _METRICS, e) from e

    def history(self) -> list[dict]:
        """The logged lines, oldest first. A last line torn by a crash is left out."""
        return [row for row, _ in self._lines()]

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`, that the curve of a resumed run has no step twice."""
        if not self._writes():
            return
        self._close_log()
        if (self.path / _METRICS).exists():
            kept = [raw for row, raw in self._lines() if row["step"] <= step]
            write_atomic(self.path / _METRICS, b"".join(kept))

    def write_json(self, name: str, value: Any) -> Path:
        """Writes `<run>/<name>.json` all at once: a reader never sees half of it."""
        path = self._json_path(name)
        if not self._writes():
            return path
        if path.name == _RUN:
            raise RunError(f"{_RUN} is the run's own file: choose another name")
        write_json(path, _as_json(value))
        return path

    def read_json(self, name: str) -> Any:
        """Raises RunError if the file is not there or is not JSON."""
        path = self._json_path(name)
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunError(f"the run in {self.path} has no {path.name}") from None
        except (ValueError, RecursionError) as e:
            raise RunError(f"{path} is damaged: {e}. Delete it and make it again") from e

    def close(self) -> None:
        """Lets go of the log and the lock."""
        self._close_log()
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough: a forked child may hold it too
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _writes(self) -> bool:
        if self._lock is None and not self._follows:
            raise RunError(f"the run in {self.path} is open for reading: write to it with Run.create_or_resume")
        return self._lock is not None

    def _json_path(self, name: str) -> Path:
        return self.path / (name if name.endswith(".json") else f"{name}.json")

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _drop_torn_line(self) -> None:
        path = self.path / _METRICS
        if path.exists():
            whole = sum(len(raw) for _, raw in self._lines())
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def _lines(self) -> list[tuple[dict, bytes]]:
        path = self.path / _METRICS
        try:
            raws = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        lines = []
        for number, raw in enumerate(raws, start=1):
            try:
                row = json.loads(raw)
                if not raw.endswith(b"\n") or not isinstance(row["step"], int):
                    raise ValueError("not a whole line")
            except (ValueError, TypeError, KeyError) as e:
                if number == len(raws):  # torn by a crash
                    break
                raise RunError(f"{path}, line {number} is damaged: {e}. Delete that line to go on") from e
            lines.append((row, raw))
        return lines


def _as_json(value: Any) -> Any:
    """What JSON will give back: lists for tuples, string keys."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as e:
        raise RunError(f"this must be what JSON can hold (numbers, strings, lists, dicts): {e}") from e


def _plain(value: Any) -> Any:
    """A jax or numpy scalar or array as Python numbers; a float32 keeps its exact value."""
    return value.tolist() if hasattr(value, "tolist") else value


def _foreign(path: Path) -> list[str]:
    """What lies in the folder and is not left over from a start that was cut short."""
    return sorted(p.name for p in path.iterdir() if p.name != _LOCK and _TMP not in p.name)


def _take_lock(path: Path) -> int:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise _write_error(path / _LOCK, e) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                f"another process{f' (pid {holder})' if holder else ''} is training in {path}: "
                f"wait for it or stop it, or give --out another folder"
            ) from None
        raise RunError(f"files in {path} cannot be locked ({e.strerror}): choose a local folder") from e
    with contextlib.suppress(OSError):  # the pid is a courtesy; what needs the space reports a full disk
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _read_info(path: Path) -> dict:
    try:
        info = json.loads((path / _RUN).read_bytes())
        if not isinstance(info["config"], dict):
            raise ValueError("config is not a dictionary")
        known = info["format"]
    except FileNotFoundError:
        raise RunError(
            f"{path} holds no run (no {_RUN}): give a folder that `mlfs fit` or `spa fit` has written"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise RunError(f"{path / _RUN} is damaged ({e!r}): delete the folder and start again") from e
    if known != FORMAT:
        raise RunError(
            f"{path} has run format {known!r}, and this version of mlfs_jax reads {FORMAT}: "
            f"use the version that wrote it"
        )
    return info


def _check_same(path: Path, old: dict, new: dict) -> None:
    old, new = _leaves(old), _leaves(new)
    shown = lambda values, key: json.dumps(values[key]) if key in values else "(not set)"  # noqa: E731
    different = [
        f"  {key}: {shown(old, key)} in the folder, {shown(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if shown(old, key) != shown(new, key)
    ]
    if [line.split(":")[0].strip() for line in different] == ["data"]:
        raise RunError(
            f"{path} holds a run on other examples: the task's data, or the tokenizer's files, have changed since. "
            "Bring them back, give --out another folder, or delete this one to start over."
        )
    if different:
        raise RunError(
            f"{path} holds a run with another configuration:\n" + "\n".join(different) + "\n"
            "Give --out another folder, or delete this one to start over."
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{prefix}.{key}" if prefix else key)
    return found


def check_finite(step: int, losses: Any) -> None:
    """Raise RunError where training has left the numbers: nothing after it would be one."""
    if not np.isfinite(losses).all():
        raise RunError(
            f"the loss is {np.asarray(losses).tolist()} at step {step}: training has diverged. Look for outliers in "
            "the data, and fit with a lower learning rate into another folder."
        )


def write_json(path: Path, value: Any) -> None:
    """A value as indented JSON, see :func:`write_atomic`."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file in one rename: it holds all of ``content`` or what it held before. RunError when it cannot be."""
    tmp = path.with_name(f"{path.name}{_TMP}{os.getpid()}")
    try:
        with tmp.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise _write_error(path, e) from e


def _write_error(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: {path} could not be written. Free some space and run again")
    return RunError(f"{path} could not be written: {error.strerror}")
