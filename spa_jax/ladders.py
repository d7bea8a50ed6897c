"""The backbone's activations, computed once: it is frozen, so every epoch reads the same taps.

A cache holds, for every example that a run will use, the frame's taps in fp16 (they have unit root mean square) and the
last hidden state of the positions that count, in memory or on disk. Its size is known beforehand, and bounded.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from mlfs_jax.data.batches import BUCKETS, eval_batches
from mlfs_jax.data.encoded import Encoded
from mlfs_jax.hosts import to_host
from mlfs_jax.model import Model
from mlfs_jax.run import write_atomic, write_json
from mlfs_jax.sharding import beside, put, sharding_of
from spa_jax.errors import TapCacheError
from spa_jax.model import cloud_step
from spa_jax.seam import Frame

GROUP = 16
"""Examples that go through the backbone at once."""
META, FILLED = "ladders.json", "filled.npy"


class LadderCache:
    """Taps and hidden states of some examples of a split.

    Args:
        rows: which examples.
        tapped: layers whose outputs are kept, beside the first one's input.
        limit_gb: the most it may take.
        folder: keep it there; None: in memory.
        fingerprint: of base and data: a folder that holds another one's is refused.

    Raises:
        TapCacheError: it would be larger than the bound, or the folder is of something else.
    """

    taps: np.ndarray
    hidden: np.ndarray

    def __init__(
        self,
        model: Model,
        encoded: Encoded,
        rows: Sequence[int] | np.ndarray,
        tapped: tuple[int, ...],
        *,
        limit_gb: float,
        folder: Path | None = None,
        fingerprint: str = "",
    ):
        self.model, self.encoded, self.tapped = model, encoded, tapped
        self.rows = np.unique(np.asarray(rows, np.int64))
        lengths, first = encoded.lengths[self.rows], encoded.starts[self.rows] - 1
        self.tap_at = _offsets(lengths)
        self.hidden_at = _offsets(lengths - 1 - first)  # the last token predicts nothing
        self.first = first
        D = model.config.embed
        shapes = {
            "taps": (int(self.tap_at[-1]), len(tapped) + 1, D),
            "hidden": (int(self.hidden_at[-1]), D),
        }
        self.bytes = 2 * int(np.prod(shapes["taps"])) + 4 * int(np.prod(shapes["hidden"]))
        if self.bytes > limit_gb * 1e9:
            raise TapCacheError(
                f"the taps of {len(self.rows)} examples take {self.bytes / 1e9:.2f} GB, more than the bound of "
                f"{limit_gb:g} GB: raise --cache-gb, tap fewer layers (--side.every), use fewer examples (--limit), or "
                "do without (--cache-taps off)."
            )
        self.folder = folder
        self.filled = np.zeros(len(self.rows), bool)
        if folder is None:
            self.taps, self.hidden = np.empty(shapes["taps"], np.float16), np.empty(shapes["hidden"], np.float32)
        else:
            self._open(folder, shapes, fingerprint)
        self._place = {int(row): i for i, row in enumerate(self.rows)}

    def _open(self, folder: Path, shapes: dict, fingerprint: str) -> None:
        rows = hashlib.sha256(self.rows.tobytes()).hexdigest()
        meta = {"fingerprint": fingerprint, "rows": rows, "tapped": list(self.tapped), "bytes": self.bytes}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = json.loads((folder / META).read_bytes()) if (folder / META).exists() else None
            if known is not None and known != meta:
                raise TapCacheError(
                    f"{folder} holds the taps of another base, other data or other layers: delete it, or name another "
                    "folder."
                )
            self.taps = _map(folder / "taps.f16", np.float16, shapes["taps"], new=known is None)
            self.hidden = _map(folder / "hidden.f32", np.float32, shapes["hidden"], new=known is None)
            if known is None:
                _save(folder / FILLED, self.filled)
                write_json(folder / META, meta)
            self.filled = np.load(folder / FILLED)
        except (OSError, ValueError, EOFError) as e:
            todo = "Delete the folder to make them anew."
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                todo = f"They take {self.bytes / 1e9:.2f} GB: make room, or name a folder elsewhere (--taps-folder)."
            raise TapCacheError(f"the taps in {folder} cannot be used: {e}. {todo}") from e

    def fill(
        self, *, stop: Callable[[], bool] = lambda: False, advance: Callable[[int], None] = lambda n: None
    ) -> bool:
        """Run the backbone over all examples that are not there yet; False if it was asked to stop.

        Examples go through it shortest first, in fixed groups, so that what is cached does not depend on when.
        """
        order = np.argsort(self.encoded.lengths[self.rows], kind="stable")
        part = self.encoded.take(self.rows)
        step = 0
        for batch in eval_batches(part, GROUP, buckets=BUCKETS):
            members = order[step : step + GROUP]
            step += GROUP
            if not self.filled[members].all():
                base = self.model.base
                cloud = cloud_step(self.model.graphdef, base, {}, None, beside(base, batch), tapped=self.tapped)
                taps, hidden = to_host(cloud.frame.taps.astype(jnp.float16)), to_host(cloud.hidden.astype(jnp.float32))
                for b, i in enumerate(members):
                    length = self.tap_at[i + 1] - self.tap_at[i]
                    self.taps[self.tap_at[i] : self.tap_at[i + 1]] = taps[:, b, :length].swapaxes(0, 1)
                    self.hidden[self.hidden_at[i] : self.hidden_at[i + 1]] = hidden[b, self.first[i] : length - 1]
                self.filled[members] = True
                if self.folder is not None and (step // GROUP % 8 == 0 or step >= len(order)):
                    self._flush()
            advance(len(members))
            if stop():
                if self.folder is not None:
                    self._flush()
                return False
        return True

    def _flush(self) -> None:
        for kept in (self.taps, self.hidden):
            assert isinstance(kept, np.memmap)
            kept.flush()
        _save(self.folder / FILLED, self.filled)

    def get(self, rows: Int[np.ndarray, " B"], width: int) -> tuple[Frame, np.ndarray]:
        """The frame [n + 1, B, width, D] of these examples, and f [B, width, D] where it counts, else 0."""
        n, D = self.taps.shape[1:]
        taps, hidden = np.zeros((n, len(rows), width, D), np.float16), np.zeros((len(rows), width, D), np.float32)
        real: Bool[np.ndarray, "B T"] = np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            i = self._place[int(row)]
            length = self.tap_at[i + 1] - self.tap_at[i]
            taps[:, b, :length] = self.taps[self.tap_at[i] : self.tap_at[i + 1]].swapaxes(0, 1)
            hidden[b, self.first[i] : length - 1] = self.hidden[self.hidden_at[i] : self.hidden_at[i + 1]]
            real[b, :length] = True
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), real.shape)
        return Frame(taps, np.where(real, positions, 0), real), hidden


def spread(mesh: Mesh, frame: Frame, f: np.ndarray) -> tuple[Frame, Array]:
    """What :meth:`LadderCache.get` gives, each row on the device that has the tokens of its example."""

    def place(x, at: int) -> Array:
        names = ["batch" if axis == at else "" for axis in range(x.ndim)]
        return put(x, sharding_of(mesh, tuple(names), x.shape))

    taps, positions, real = place(frame.taps, 1), place(frame.positions, 0), place(frame.real, 0)
    return Frame(taps, positions, real), place(f, 0)


def _map(file: Path, dtype: DTypeLike, shape: tuple[int, ...], *, new: bool) -> np.memmap:
    """An array in a file that has all of its room on the disk: a map of a file with holes ends in SIGBUS when it fills.

    Two runs may share a folder and begin at once: what is there already stays.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with file.open("ab" if new else "r+b") as f:
        if new:
            f.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(f.fileno(), 0, size)
        elif (there := os.fstat(f.fileno()).st_size) != size:
            raise ValueError(f"{file.name} has {there} bytes, expected {size}")
    return np.memmap(file, dtype, "r+", shape=shape)


def _save(file: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(file, buffer.getvalue())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
