"""Checkpoints of the training state: asynchronous, atomic, checksummed. The only module that knows orbax.

One step is one folder, `<directory>/<step>/`: orbax's files plus `manifest.json`, which holds the caller's
`meta`, the shape and dtype of every array, and the size and sha256 of every file. Orbax writes into a temporary
folder; the manifest is written there too, last, and then the folder is renamed. So a step that exists is whole,
and a step whose bytes have changed since is refused: a flipped byte that no format notices is a wrong weight.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlfs_jax.errors import CheckpointError, first_line, some

FORMAT = 1
MANIFEST = "manifest.json"
# Orbax still writes its own time stamps here after our manifest; we never read it.
_NOT_SUMMED = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)
_TRASH = ".deleted"
_TMP = ".orbax-checkpoint-tmp"


class _QuietOrbax(logging.Filter):
    """Drops orbax's log lines: what matters of them reaches the user as a CheckpointError."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_QuietOrbax())


class _Handler(ocp.StandardCheckpointHandler):
    """The standard handler, which also writes the manifest, last, before the folder is renamed."""

    header: dict[str, Any]

    def finalize(self, directory) -> None:
        super().finalize(directory)
        _write_manifest(Path(directory), self.header)


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    pass


class Checkpoints:
    """The checkpoints of one run.

        with Checkpoints(run.path / "checkpoints") as checkpoints:
            if (step := checkpoints.latest()) is not None:
                state, meta = checkpoints.restore(state)
            ...
            checkpoints.save(step, state, {"epoch": 3})      # returns at once, writes in the background

    Only the first `save` changes anything on disk: reading the checkpoints of a run that trains is safe.

    Args:
      directory: where the steps lie; made at the first save.
      keep: how many of the newest steps stay (at least 1). The older ones go once a newer one is whole.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least 1 checkpoint must be kept; give keep=1 or more")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._handler = _Handler()
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pending: int | None = None  # the step that the background thread is writing

    def steps(self) -> list[int]:
        """The steps that lie on disk, oldest first."""
        try:
            names = [p.name for p in self.directory.iterdir() if p.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

    def latest(self) -> int | None:
        """The newest step on disk, or None. A save that is still under way does not count yet."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict | None = None) -> None:
        """Starts to save. The arrays may be donated or changed as soon as this returns.

        Args:
          step: grows from save to save. Saving the newest step again with the same `meta` does nothing.
          state: any pytree of arrays (jax or numpy; sharded or not). PRNG keys as `jax.random.key_data(key)`.
          meta: anything JSON can hold.

        Raises:
          CheckpointError: this save, or the one before it that ran in the background, could not be written.
        """
        self.wait()
        meta = _as_json(meta or {})
        arrays = _flatten(state, "the state")
        latest = self.latest()
        if latest is not None and step <= latest:
            if step == latest and _read_manifest(self._path(step), step)["meta"] == meta:
                return
            raise CheckpointError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; steps must grow. "
                f"To go back to an earlier step, delete the later folders first."
            )
        if self._writer is None:
            self._prepare()
        # numpy arrays are the caller's to change while the background thread writes
        held = {k: a.copy() if isinstance(a, np.ndarray) else a for k, a in arrays.items() if a.size}
        if not held:
            raise CheckpointError(f"cannot save step {step}: the state has no array with values in it")
        self._handler.header = {"format": FORMAT, "step": step, "meta": meta, "arrays": _schema(arrays)}
        self._pending = step
        try:
            self._writer.save(self._path(step), args=_Save(held))
        except Exception as e:
            raise self._failed(e) from e

    def wait(self) -> None:
        """Blocks until the save in the background is whole on disk; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as e:
            raise self._failed(e) from e
        self._pending = None
        if jax.process_index() == 0:
            for step in self.steps()[: -self.keep]:
                _remove(self._path(step))

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict]:
        """Reads a step back, bit by bit.

        Args:
          template: a pytree like the one saved; its leaves (arrays or ShapeDtypeStructs) say the shape and dtype
            of each array, and where it goes. The sharding may differ from the one it was saved with.
          step: which one; None for the newest.

        Returns:
          (state, meta): the state has the template's tree type, and numpy arrays where the template has them.

        Raises:
          CheckpointError: there is no such step, its files are damaged or foreign, or do not fit the template.
        """
        self.wait()
        if step is None and (step := self.latest()) is None:
            raise CheckpointError(f"there is no checkpoint in {self.directory}: start the training first")
        path = self._path(step)
        if not path.is_dir():
            raise CheckpointError(f"there is no step {step} in {self.directory}; it holds {self.steps()}")
        manifest = _read_manifest(path, step, self._advice(step))
        wanted = _flatten(template, "the template")
        _check_fit(wanted, manifest["arrays"], path)
        _check_files(path, manifest, step, self._advice(step))
        targets = {k: _target(a) for k, a in wanted.items() if _size(a)}
        try:
            found = self._handler.restore(path, args=_Restore(targets)) if targets else {}
        except Exception as e:
            raise CheckpointError(f"step {step} in {path} could not be read: {first_line(e)}") from e
        leaves = [found[k] if _size(a) else _empty(a) for k, a in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), manifest["meta"]

    def close(self) -> None:
        """Waits for the save in the background, then lets go of orbax's threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
                self._handler = _Handler()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError as e:
            if error is None:
                raise
            error.add_note(str(e))  # what went wrong first is what the user should see

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _prepare(self) -> None:
        """Makes the folder, clears away what a killed process left in it, starts orbax."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CheckpointError(f"cannot make the checkpoint folder {self.directory}: {e}") from e
        if jax.process_index() == 0:
            self._sweep()
        self._writer = ocp.AsyncCheckpointer(self._handler)

    def _sweep(self) -> None:
        for path in self.directory.iterdir():
            if _TMP in path.name or path.name.endswith(_TRASH):
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._pending = self._pending, None
        if jax.process_index() == 0:
            self._sweep()  # a half-written step must not hold the space that the next one needs
        good = self.latest()
        kept = "no step was saved before it" if good is None else f"the last good step, {good}, is untouched"
        what = f"checkpoint step {step} could not be written to {self.directory}; {kept}."
        if _disk_full(error):
            return CheckpointError(f"the disk is full: {what} Free some space and run the same command again.")
        return CheckpointError(f"{what} {first_line(error)}")

    def _advice(self, step: int) -> str:
        earlier = [s for s in self.steps() if s < step]
        if earlier:
            return f"Delete {self._path(step)} to continue from step {earlier[-1]}."
        return f"There is no earlier step: delete {self.directory} to start over."


def _flatten(tree: Any, what: str) -> dict[str, Any]:
    """The leaves by name, in tree order: `lora/layers.q/a`."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        key = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            raise CheckpointError(
                f"{what} has a {type(leaf).__name__} at {key!r}: a checkpoint holds arrays; "
                f"make it one with jnp.asarray, or put it into meta"
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise CheckpointError(f"{what} has a typed PRNG key at {key!r}: use jax.random.key_data(key)")
        if key in flat:
            raise CheckpointError(f"{what} has two arrays named {key!r}: use no '/' in the keys")
        flat[key] = leaf
    return flat


def _schema(arrays: dict[str, Any]) -> dict[str, list]:
    return {k: [np.dtype(a.dtype).name, list(a.shape)] for k, a in arrays.items()}


def _size(a: Any) -> int:
    return int(np.prod(a.shape))


def _target(a: Any) -> Any:
    if isinstance(a, np.ndarray):
        return a
    sharding = a.sharding if a.sharding is not None else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _empty(a: Any) -> Any:
    """An array without values, which orbax does not store."""
    zeros = np.zeros(a.shape, a.dtype)
    return zeros if isinstance(a, np.ndarray) else jax.device_put(zeros, _target(a).sharding)


def _as_json(meta: dict) -> dict:
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"meta must be what JSON can hold (numbers, strings, lists, dicts): {e}") from e


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sum_file(path: Path) -> list:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return [f.tell(), digest]


def _body(manifest: dict) -> bytes:
    return json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True).encode()


def _write_manifest(directory: Path, header: dict) -> None:
    files = {
        p.relative_to(directory).as_posix(): _sum_file(p)
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name not in _NOT_SUMMED
    }
    manifest = {**header, "files": files}
    manifest["sha256"] = _sum(_body(manifest))
    with (directory / MANIFEST).open("w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _read_manifest(path: Path, step: int, advice: str = "") -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        known = manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {MANIFEST}: it is damaged, or another program wrote it. {advice}"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as e:
        raise _damaged(path, step, f"{MANIFEST}: {first_line(e)}", advice) from e
    if isinstance(known, int) and known > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {known}, and this version of mlfs_jax reads up to {FORMAT}: "
            f"use the newer version that wrote it"
        )
    if manifest.get("sha256") != _sum(_body(manifest)):
        raise _damaged(path, step, f"{MANIFEST} has changed since it was written", advice)
    if manifest["step"] != step:
        raise CheckpointError(f"{path} holds step {manifest['step']}: the folder was renamed; name it back")
    return manifest


def _check_files(path: Path, manifest: dict, step: int, advice: str) -> None:
    for name, expected in manifest["files"].items():
        try:
            found = _sum_file(path / name)
        except OSError as e:
            raise _damaged(path, step, f"{name}: {e.strerror}", advice) from e
        if found[0] != expected[0]:
            raise _damaged(path, step, f"{name} has {found[0]} bytes instead of {expected[0]}", advice)
        if found != expected:
            raise _damaged(path, step, f"{name} has changed since it was written (sha256)", advice)


def _check_fit(wanted: dict[str, Any], saved: dict[str, list], path: Path) -> None:
    todo = "Use the configuration that the checkpoint was written with, or another output folder."
    missing, extra = [k for k in wanted if k not in saved], [k for k in saved if k not in wanted]
    if missing or extra:
        lacks = [f"expected but not found: {some(map(repr, missing))}"] if missing else []
        has = [f"found but not expected: {some(map(repr, extra))}"] if extra else []
        raise CheckpointError(f"the checkpoint {path} does not fit: {'; '.join(lacks + has)}. {todo}")
    for key, (dtype, shape) in _schema(wanted).items():
        if [dtype, shape] != saved[key]:
            found_dtype, found_shape = saved[key]
            raise CheckpointError(
                f"the checkpoint {path} does not fit at {key!r}: expected {dtype}{shape}, "
                f"found {found_dtype}{found_shape}. {todo}"
            )


def _damaged(path: Path, step: int, what: str, advice: str) -> CheckpointError:
    return CheckpointError(f"checkpoint step {step} in {path} is damaged: {what}. {advice}")


def _remove(path: Path) -> None:
    """Deletes a step; renamed first, so that a kill half way leaves no half step behind."""
    with contextlib.suppress(OSError):  # an old step that stays is no reason to stop the training
        shutil.rmtree(path.rename(path.with_name(path.name + _TRASH)), ignore_errors=True)


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(s in str(error) for s in ("No space left on device", "ENOSPC", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False
