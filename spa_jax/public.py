"""What of a plugin may be given to a cloud, once and for everybody: its Downs, and perhaps its gate.

With them the cloud projects activations before it sends them, D / d times fewer bytes. They are not personal when they
were trained on public data or not at all; whether they are is the owner's to decide, which is why they are a file that
somebody hands to the server's operator, and nothing that a device ever sends.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy as safetensors
from safetensors import SafetensorError

from mlfs_jax.errors import RunError
from spa_jax.errors import PluginError


@dataclass(frozen=True, eq=False)
class Public:
    """The cloud's copy of Down.

    Attributes:
        taps: [n], indices of the tapped layers.
        down: [n + 1, D, d].
        bias: [n + 1, d], or None.
        gate: [D + 1, 2], kernel and bias of a gate, or None.
    """

    taps: np.ndarray
    down: np.ndarray
    bias: np.ndarray | None = None
    gate: np.ndarray | None = None

    @property
    def name(self) -> str:
        """By which a device asks for it: a fingerprint of taps and Downs."""
        digest = hashlib.sha256(np.asarray(self.taps, "<i4").tobytes())
        for x in (self.down, self.bias):
            digest.update(b"" if x is None else repr(x.shape).encode() + np.asarray(x, "<f4").tobytes())
        return digest.hexdigest()[:32]

    def project(self, taps: np.ndarray) -> np.ndarray:
        """[n + 1, T, D] -> [n + 1, T, d], as :func:`spa_jax.side.project` does."""
        projected = np.matmul(taps, self.down)
        return projected if self.bias is None else projected + self.bias[:, None]


def save_public(file: str | Path, public: Public) -> Path:
    """Write one into a safetensors file; RunError for a file that holds anything else."""
    file = Path(file).expanduser()
    if file.exists():
        try:
            load_public(file)
        except PluginError:
            raise RunError(f"{file} is there and holds no public Down: choose another name, or remove it.") from None
    arrays = {name: getattr(public, name) for name in ("taps", "down", "bias", "gate")}
    kinds = {"taps": np.int32}
    arrays = {name: np.ascontiguousarray(x, kinds.get(name, np.float32)) for name, x in arrays.items() if x is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f".{file.name}.tmp")
    whole.write_bytes(safetensors.save(arrays))
    return whole.replace(file)


def load_public(file: str | Path) -> Public:
    """Read what :func:`save_public` wrote; raises PluginError."""
    try:
        arrays = safetensors.load_file(str(file))
        public = Public(**arrays)
    except (OSError, SafetensorError, TypeError) as error:
        raise PluginError(f"{file} holds no public Down: {error}. Write one with `spa publish`.") from error
    n, D = len(public.taps) + 1, public.down.shape[1] if public.down.ndim == 3 else 0
    fits = public.down.ndim == 3 and len(public.down) == n
    fits &= public.bias is None or public.bias.shape == (n, public.down.shape[-1])
    if not (fits and (public.gate is None or public.gate.shape == (D + 1, 2))):
        raise PluginError(f"{file} holds no public Down: its arrays do not fit each other.")
    return public
