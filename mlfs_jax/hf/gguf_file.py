"""The GGUF container: metadata and dequantised tensors of one file.

Written after the format's description (ggml, docs/gguf.md). Block types are decoded by the ``gguf`` package; the
container is walked here because its reader makes several arrays for every token of the vocabulary (2.4 s for
SmolLM2's 49,152) and does not look whether the file is whole.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlfs_jax.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Tensor types that are read; Q5_* because llama.cpp puts them beside Q4_K where rows are no multiple of 256."""

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value type -> how ``struct`` calls it."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file.

    Attributes:
        type: name of its ggml type, one of :data:`READABLE`.
        shape: as numpy has it, slowest axis first (the file lists the fastest first).
        offset, nbytes: in the file.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed file: nothing of its tensors is in memory.

    Attributes:
        metadata: key -> number, bool, string or list.
        tensors: name -> place.
        header: its bytes before the tensors, for telling files apart.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    header: bytes

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 (F16 as float16)."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
        if raw.size != tensor.nbytes:
            raise _cut(self.path, f"in the middle of the tensor {name}")
        if tensor.type in ("F32", "F16"):
            return raw.view("<f4" if tensor.type == "F32" else "<f2").reshape(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Parse a GGUF file, version 2 or 3, little-endian.

    Raises:
        CheckpointError: it is no GGUF, of another version or byte order, cut short, has a name twice, or has a tensor
            of a type that is not read here.
    """
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            if start[:4] != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it starts with {start[:4]!r}, expected {MAGIC!r}.")
            if size < 24:
                raise _cut(path, "in its header")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _parse(path: Path, data: mmap.mmap, size: int) -> GGUFFile:
    cursor = _Cursor(path, data, 4)
    version = cursor.take("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
        what = "big-endian" if swapped else f"of GGUF version {version}"
        raise CheckpointError(
            f"{path} is {what}: expected little-endian and version {' or '.join(map(str, VERSIONS))}. Convert it "
            "again with a current llama.cpp."
        )
    counts = cursor.take("Q"), cursor.take("Q")
    metadata: dict[str, Any] = {}
    for _ in range(counts[1]):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path} has the metadata key {key!r} twice.")
        metadata[key] = cursor.value(cursor.take("I"))
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(counts[0]):
        name = cursor.string()
        if name in infos:
            raise CheckpointError(f"{path} has the tensor {name!r} twice.")
        shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
        infos[name] = shape, cursor.take("I"), cursor.take("Q")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: general.alignment = {alignment!r}, expected a positive number of bytes.")
    header = data[: cursor.at]
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(path, name, *info, start) for name, info in infos.items()}
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > size:
            raise _cut(path, f"before the end of the tensor {name} (byte {tensor.offset + tensor.nbytes} of {size})")
    return GGUFFile(path, metadata, tensors, header)


def _place(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GGUFTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(t): t for t in GGMLQuantizationType}
    label = known[kind].name if kind in known else f"number {kind}"
    if label not in READABLE:
        raise CheckpointError(
            f"{path}: the tensor {name} is of type {label}; read here are {', '.join(READABLE)}. "
            "Quantise the model to one of these, or take its F16 file."
        )
    block, nbytes = GGML_QUANT_SIZES[known[kind]]
    if not shape or shape[-1] % block:
        raise CheckpointError(f"{path}: the tensor {name} of type {label} has rows of {shape[-1:]}, not of {block}s.")
    elements = 1
    for n in shape:
        elements *= n
    return GGUFTensor(label, shape, start + offset, elements // block * nbytes)


@dataclass
class _Cursor:
    """Reads one value after the other; the end of the file is an error that says so."""

    path: Path
    data: mmap.mmap
    at: int

    def take(self, code: str):
        return self.many(code, 1)[0]

    def many(self, code: str, count: int) -> tuple:
        width = struct.calcsize(code)
        if self.at + width * count > len(self.data):
            raise _cut(self.path, "in its header")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += width * count
        return values

    def string(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.data):
            raise _cut(self.path, "in its header")
        text = self.data[self.at : self.at + length]
        self.at += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: {text[:40]!r} in its header is no UTF-8.") from error

    def value(self, kind: int, depth: int = 0) -> object:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self.path} is damaged: there is no metadata type {kind}.")
        if depth > 8:
            raise CheckpointError(f"{self.path} is damaged: arrays of arrays of arrays without end in its header.")
        item, count = self.take("I"), self.take("Q")
        if item in SCALARS:
            return list(self.many(SCALARS[item], count))
        read: Callable[[], object] = self.string if item == STRING else lambda: self.value(item, depth + 1)
        if count > len(self.data) - self.at:  # every item takes a byte at least
            raise _cut(self.path, "in its header")
        return [read() for _ in range(count)]


def _cut(path: Path, where: str) -> CheckpointError:
    return CheckpointError(f"{path} is cut short: it ends {where}. Download or copy it again.")
