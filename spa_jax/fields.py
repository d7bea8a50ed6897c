"""Values as they travel: three codings of float arrays, and the kinds of fields that frames are made of.

A kind packs a value into what msgpack can write, and unpacks what msgpack read; both check it. Arrays travel as
``[dtype, shape, bytes]``, little-endian. Float arrays have three codings: "fp32", "fp16", and "int8" with a scale for
each vector along the last axis. The scale is a power of sqrt(2), written in six bits [ours: at the 32 channels of a
plugin a scale in fp16 would be six percent of a frame, this is two]. What is rounded is the vector's Hartley transform
[ours, after QuaRot's rotations, arXiv 2404.00456]: the few channels that are ten times as large as the others in a
language model's activations would spend the eight bits alone; spread over all, they cost the others nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from spa_jax.errors import WireError

CODINGS = ("fp32", "fp16", "int8")

_INTS = 2**31 - 1
_DTYPES = {"fp32": "<f4", "fp16": "<f2", "int8": "i1", "int32": "<i4"}
_NAMES = tuple(_DTYPES)
_SCALES, _BIAS = 64, 40  # scales 2 ** (-20 .. 11.5) by half octaves


class Unfit(Exception):
    """A value that is not of its kind."""

    def __init__(self, expected: str, got: Any):
        super().__init__(f"expected {expected}, got {describe(got)}")


def describe(value: Any) -> str:
    """What a value is, in few words, and without the text or the numbers of a user."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)[:40]
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes | list | tuple):
        return f"{type(value).__name__} of length {len(value)}"
    return type(value).__name__


# ---------------------------------------------------------------------------------------------- codings of arrays
def squeeze(x: np.ndarray, coding: str) -> np.ndarray:
    """Floats as they will travel, to be kept until they do: float32, float16, or uint8 [..., 1 + W], scale first.

    Squeezing what :func:`expand` gave back loses nothing more.

    Raises:
        WireError: a value that is not finite, or that the coding cannot hold.
    """
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        raise WireError("an array to be sent holds values that are not finite; the model or the plugin is broken.")
    if coding == "fp32":
        return x
    if coding == "fp16":
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        if not np.isfinite(half).all():
            raise WireError(f"values up to {np.abs(x).max():.3g} do not fit in fp16; use the coding int8 or fp32.")
        return half
    x = _spread(x)
    peak = np.abs(x).max(-1, keepdims=True)
    code = np.ceil(2 * np.log2(np.maximum(peak, 1e-30) / 127) - 1e-5) + _BIAS
    if (code >= _SCALES).any():
        raise WireError(f"values up to {peak.max():.3g} do not fit in int8 with a scale; use the coding fp32.")
    code = np.maximum(code, 0).astype(np.uint8)
    q = np.clip(np.rint(x / _scale(code)), -127, 127).astype(np.int8)
    return np.concatenate([code, q.view(np.uint8)], -1)


def expand(kept: np.ndarray) -> np.ndarray:
    """The float32 array behind what :func:`squeeze` gave."""
    if kept.dtype != np.uint8:
        return kept.astype(np.float32)
    return _from_int8(kept[..., :1], np.ascontiguousarray(kept[..., 1:]).view(np.int8))


def _from_int8(code: np.ndarray, q: np.ndarray) -> np.ndarray:
    return _spread(q * _scale(code))


def _spread(x: np.ndarray) -> np.ndarray:
    """The orthonormal Hartley transform along the last axis: a rotation, and its own inverse."""
    waves = np.fft.fft(x, norm="ortho")
    return (waves.real - waves.imag).astype(np.float32)


def _scale(code: np.ndarray) -> np.ndarray:
    return np.exp2((code.astype(np.float32) - _BIAS) / 2)


def _six_bits(codes: np.ndarray) -> bytes:
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 2:]).tobytes()


def _from_six_bits(raw: np.ndarray, count: int) -> np.ndarray:
    bits = np.unpackbits(raw, count=6 * count).reshape(count, 6)
    return np.packbits(np.pad(bits, ((0, 0), (2, 0))), axis=1)[:, 0]


# ------------------------------------------------------------------------------------------------ kinds of fields
@dataclass(frozen=True)
class Whole:
    """An integer from ``low`` to ``high``."""

    high: int = _INTS
    low: int = 0

    def pack(self, value: Any, coding: str) -> int:
        return self.unpack(int(value) if isinstance(value, np.integer) else value)

    def unpack(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise Unfit(f"a whole number from {self.low} to {self.high}", value)
        return value


@dataclass(frozen=True)
class Real:
    """A finite float."""

    def pack(self, value: Any, coding: str) -> float:
        return self.unpack(float(value) if isinstance(value, int | np.floating) else value)

    def unpack(self, value: Any) -> float:
        if type(value) is not float or not math.isfinite(value):
            raise Unfit("a finite float", value)
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def pack(self, value: Any, coding: str) -> bool:
        return self.unpack(value)

    def unpack(self, value: Any) -> bool:
        if type(value) is not bool:
            raise Unfit("true or false", value)
        return value


@dataclass(frozen=True)
class Text:
    """A string of at most ``most`` characters."""

    most: int

    def pack(self, value: Any, coding: str) -> str:
        return self.unpack(value)

    def unpack(self, value: Any) -> str:
        if type(value) is not str or len(value) > self.most:
            raise Unfit(f"text of at most {self.most} characters", value)
        return value


@dataclass(frozen=True)
class OneOf:
    """One of a few names; its number travels."""

    names: tuple[str, ...]

    def pack(self, value: Any, coding: str) -> int:
        if value not in self.names:
            raise Unfit(f"one of {', '.join(self.names)}", value)
        return self.names.index(value)

    def unpack(self, value: Any) -> str:
        if type(value) is not int or not 0 <= value < len(self.names):
            raise Unfit(f"the number of one of {', '.join(self.names)}", value)
        return self.names[value]


@dataclass(frozen=True)
class Tensor:
    """An array of as many axes as ``most`` has entries, each between ``least`` and its entry long.

    Floats are coded as the sender likes unless ``exact``; they arrive as float32.
    """

    most: tuple[int, ...]
    whole: bool = False
    exact: bool = False
    least: int = 1

    def _expected(self) -> str:
        return f"{'int32' if self.whole else 'floats'} of at most {list(self.most)}, axes no shorter than {self.least}"

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.most) and all(self.least <= n <= m for n, m in zip(shape, self.most, strict=True))

    def pack(self, value: Any, coding: str) -> list:
        x = np.asarray(value)
        if not self._fits(x.shape) or x.dtype.kind not in ("iu" if self.whole and x.size else "iuf"):
            raise Unfit(self._expected(), x)
        if self.whole:
            if x.size and not 0 <= x.min() <= x.max() <= _INTS:
                raise Unfit(f"numbers from 0 to {_INTS}", x)
            coding, raw = "int32", x.astype("<i4").tobytes()
        else:
            coding = "fp32" if self.exact else coding
            kept = squeeze(x, coding)
            if coding == "int8":
                raw = _six_bits(np.ascontiguousarray(kept[..., 0])) + kept[..., 1:].tobytes()
            else:
                raw = kept.astype(_DTYPES[coding]).tobytes()
        return [_NAMES.index(coding), list(x.shape), raw]

    def unpack(self, value: Any) -> np.ndarray:
        if type(value) is not list or [type(part) for part in value] != [int, list, bytes]:
            raise Unfit("an array as [dtype, shape, bytes]", value)
        number, shape, raw = value
        allowed = ("int32",) if self.whole else ("fp32",) if self.exact else CODINGS
        if not 0 <= number < len(_NAMES) or _NAMES[number] not in allowed:
            raise Unfit(f"the number of a dtype of {', '.join(allowed)}", number)
        if any(type(n) is not int for n in shape) or not self._fits(tuple(shape)):
            raise Unfit(self._expected(), shape)
        coding, count = _NAMES[number], math.prod(shape)
        vectors = count // max(shape[-1], 1) if coding == "int8" else 0
        packed = -(-6 * vectors // 8)
        wanted = packed + count * np.dtype(_DTYPES[coding]).itemsize
        if len(raw) != wanted:
            raise Unfit(f"{wanted} bytes of {coding} {shape}", raw)
        x = np.frombuffer(raw, _DTYPES[coding], offset=packed).reshape(shape)
        if self.whole:
            if x.size and x.min() < 0:
                raise Unfit(f"numbers from 0 to {_INTS}", x)
            return x.astype(np.int32)
        if coding == "int8":
            code = _from_six_bits(np.frombuffer(raw, np.uint8, packed), vectors)
            return _from_int8(code.reshape(*shape[:-1], 1), x)
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise Unfit("finite numbers", x)
        return x


@dataclass(frozen=True)
class Positions:
    """Ascending places in a text, int32 [T]; when they follow one another only the last and the first travel."""

    most: int = 2**17

    def pack(self, value: Any, coding: str) -> Any:
        x = np.asarray(value)
        self._check(x)
        if len(x) == 1:
            return int(x[0])
        if x[-1] - x[0] == len(x) - 1:
            return [int(x[0]), int(x[-1])]
        return [*Tensor((self.most,), whole=True).pack(x, coding)]

    def unpack(self, value: Any) -> np.ndarray:
        if type(value) is list and len(value) == 3:
            x = Tensor((self.most,), whole=True).unpack(value)
        else:
            ends = [value, value] if type(value) is int else value
            if type(ends) is not list or [type(n) for n in ends] != [int, int]:
                raise Unfit("a position, [first, last], or an array of positions", value)
            first, last = ends
            if not 0 <= first <= last <= _INTS or last - first >= self.most:
                raise Unfit(f"first <= last, at most {self.most} positions", value)
            x = np.arange(first, last + 1, dtype=np.int32)
        self._check(x)
        return x

    def _check(self, x: np.ndarray) -> None:
        good = x.ndim == 1 and x.dtype.kind in "iu" and 1 <= len(x) <= self.most and x[0] >= 0 and x[-1] <= _INTS
        if not good or (np.diff(x.astype(np.int64)) <= 0).any():
            raise Unfit(f"at most {self.most} ascending positions", x)


@dataclass(frozen=True)
class Maybe:
    """A value, or nothing."""

    kind: Any

    def pack(self, value: Any, coding: str) -> Any:
        return None if value is None else self.kind.pack(value, coding)

    def unpack(self, value: Any) -> Any:
        return None if value is None else self.kind.unpack(value)
