"""Frames between device and cloud: msgpack, versioned, bounded and strict. docs/protocol.md is their description.

A frame is one websocket message, ``[version, type, field, ...]``. Each message class below declares its fields and
what each may hold (:mod:`spa_jax.fields`); what is sent is checked as what is received. Whatever bytes arrive,
:func:`decode` gives a message or raises one WireError that says what was expected, and it allocates no more than a
small multiple of what it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import msgpack
import numpy as np

from spa_jax.errors import WireError
from spa_jax.fields import CODINGS, Flag, Maybe, OneOf, Positions, Real, Tensor, Text, Unfit, Whole, describe

VERSION = 2
FRAME_BYTES = 4 * 2**20
"""How large a frame may be, unless a side says otherwise."""
ERRORS = (
    *("auth", "protocol", "bad-frame", "too-large", "model", "plugin", "too-long"),
    *("busy", "evicted", "timeout", "closing", "internal"),
)
"""What an error frame can be about; see docs/protocol.md."""
ENDS = ("more", "stop", "limit", "full")
"""What comes after a token: more of them; or it is a stop token, the last one asked for, the last that fits."""

_TOKENS = Tensor((2**20,), whole=True)
_STOP = Tensor((256,), whole=True, least=0)


@dataclass(frozen=True, eq=False)
class Hello:
    """Device: who I am and how I want to work. The first frame of a connection.

    Attributes:
        model: fingerprint of the base that the plugin was made for.
        setting, threshold, memory: see :class:`spa_jax.seam.Setting` and :class:`spa_jax.side.SideConfig`.
        taps: indices of the tapped layers.
        head: where tokens are chosen when the gate asks for the side network.
        public: name of a Down (and perhaps a gate) that the cloud holds: taps come down projected.
        gate: kernel [D, 2] with the bias as one more row; None for a setting without one, or the public one.
        coding: of float arrays, in both directions.
        budget: ms per token that round trips may take on average; None: the threshold alone decides.
        frame_bytes: the largest frame that I accept.
    """

    model: Annotated[str, Text(128)]
    setting: Annotated[str, OneOf(("s1", "s2", "s3", "spa"))]
    threshold: Annotated[float, Real()]
    memory: Annotated[str, OneOf(("stateless", "lazy", "sparse"))]
    taps: Annotated[np.ndarray, Tensor((4096,), whole=True)]
    head: Annotated[str, OneOf(("cloud", "device"))]
    public: Annotated[str | None, Maybe(Text(128))]
    gate: Annotated[np.ndarray | None, Maybe(Tensor((2**17, 2), exact=True, least=2))]
    coding: Annotated[str, OneOf(CODINGS)]
    budget: Annotated[float | None, Maybe(Real())]
    frame_bytes: Annotated[int, Whole(low=1024)]


@dataclass(frozen=True, eq=False)
class Welcome:
    """Cloud: you may go on, within these limits.

    Attributes:
        session: a name for logs.
        model: fingerprint of the base.
        vocab, embed: of the base.
        context: tokens that one session may hold.
        frame_bytes: the largest frame that I accept.
        idle_s: how long a session is kept while nothing happens.
    """

    session: Annotated[str, Text(64)]
    model: Annotated[str, Text(128)]
    vocab: Annotated[int, Whole(low=1)]
    embed: Annotated[int, Whole(low=1)]
    context: Annotated[int, Whole(low=1)]
    frame_bytes: Annotated[int, Whole(low=1024)]
    idle_s: Annotated[float, Real()]


@dataclass(frozen=True, eq=False)
class Prefill:
    """Device: read these tokens, after what the session has already, and continue them.

    Attributes:
        limit: how many new tokens at most.
        stop: tokens behind which nothing is wanted.
    """

    tokens: Annotated[np.ndarray, _TOKENS]
    limit: Annotated[int, Whole(2**20, low=1)]
    stop: Annotated[np.ndarray, _STOP]


@dataclass(frozen=True, eq=False)
class Resume:
    """Device: forget what the session has, read all these tokens instead, and continue them.

    Attributes:
        seen: positions below it have reached the side network.
        limit, stop: as in Prefill.
    """

    tokens: Annotated[np.ndarray, _TOKENS]
    seen: Annotated[int, Whole()]
    limit: Annotated[int, Whole(2**20, low=1)]
    stop: Annotated[np.ndarray, _STOP]


@dataclass(frozen=True, eq=False)
class Taps:
    """Cloud: activations that the side network has to see.

    Attributes:
        positions: [T], ascending; the last one of a due frame is the position that an answer is wanted for.
        due: whether an answer is wanted; else more frames follow at once.
        taps: [n + 1, T, D], or [n + 1, T, d] when the cloud projects.
        hidden: f [D] at the last position, when the head is on the device and the frame is due.
    """

    positions: Annotated[np.ndarray, Positions()]
    due: Annotated[bool, Flag()]
    taps: Annotated[np.ndarray, Tensor((4097, 2**17, 2**17))]
    hidden: Annotated[np.ndarray | None, Maybe(Tensor((2**17,)))]

    def __post_init__(self):
        if np.ndim(self.taps) == 3 and len(self.positions) != self.taps.shape[1]:
            raise WireError(f"taps: {len(self.positions)} positions, but activations of {self.taps.shape[1]}.")


@dataclass(frozen=True, eq=False)
class SideState:
    """Device: what the side network makes of a position.

    Attributes:
        g: [D].
    """

    position: Annotated[int, Whole()]
    g: Annotated[np.ndarray, Tensor((2**17,))]


@dataclass(frozen=True, eq=False)
class Step:
    """Device: I have chosen the token behind this position myself (the head is here); go on from it."""

    position: Annotated[int, Whole()]
    token: Annotated[int, Whole()]


@dataclass(frozen=True, eq=False)
class Token:
    """Cloud: the next token of the text, and what comes after it (ENDS). Not sent for what the device chose itself."""

    token: Annotated[int, Whole()]
    end: Annotated[str, OneOf(ENDS)]


@dataclass(frozen=True, eq=False)
class Error:
    """Either: what went wrong. A code of ERRORS, and a sentence for people."""

    code: Annotated[str, OneOf(ERRORS)]
    message: Annotated[str, Text(1000)]


@dataclass(frozen=True, eq=False)
class Bye:
    """Device: I close the connection, all is well."""


Message = Hello | Welcome | Prefill | Resume | Taps | SideState | Step | Token | Error | Bye
M = TypeVar("M", bound=Message)

MESSAGES: tuple[type[Message], ...] = (Hello, Welcome, Prefill, Resume, Taps, SideState, Step, Token, Error, Bye)
"""A message's place is its type on the wire."""
FROM_DEVICE: tuple[type[Message], ...] = (Hello, Prefill, Resume, SideState, Step, Error, Bye)
FROM_CLOUD: tuple[type[Message], ...] = (Welcome, Taps, Token, Error)
_KINDS: dict[type, list[tuple[str, Any]]] = {
    cls: [(part, hint.__metadata__[0]) for part, hint in get_type_hints(cls, include_extras=True).items()]
    for cls in MESSAGES
}
_MOST_PARTS = 2 + max(len(kinds) for kinds in _KINDS.values())


def name(cls: type) -> str:
    """The name of a message in errors, logs and the documentation: "side_state"."""
    return "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")


def encode(message: Message, coding: str = "fp32") -> bytes:
    """A message as a frame; ``coding`` is for its float arrays.

    Raises:
        WireError: a field does not hold what it should.
    """
    cls, parts = type(message), []
    for part, kind in _KINDS[cls]:
        try:
            parts.append(kind.pack(getattr(message, part), coding))
        except Unfit as error:
            raise WireError(f"{name(cls)}.{part}: {error}.") from None
    return msgpack.packb([VERSION, MESSAGES.index(cls), *parts])


def decode(
    data: str | bytes,
    allowed: tuple[type[M], ...] = MESSAGES,  # type: ignore[assignment]  # which is M when nothing else is said
    *,
    frame_bytes: int = FRAME_BYTES,
) -> M:
    """The message in a frame.

    Args:
        data: what arrived.
        allowed: what the other side may say now.
        frame_bytes: larger frames are refused unread.

    Raises:
        WireError: in all other cases; its ``code`` is "too-large", "protocol" (another version) or "bad-frame".
    """
    if not isinstance(data, bytes):
        raise WireError("expected a binary frame, got a text frame; this side speaks msgpack only.")
    if len(data) > frame_bytes:
        raise WireError(f"a frame of {len(data)} bytes: expected at most {frame_bytes}.", "too-large")
    try:
        # everything nested is bounded before it is allocated; the only long parts are byte strings
        parts = msgpack.unpackb(
            data,
            max_array_len=_MOST_PARTS,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=4096,
            max_bin_len=frame_bytes,
        )
    except Exception as error:
        # the library raises a dozen classes, some of them builtins
        raise WireError(f"not a frame: msgpack says {type(error).__name__} {str(error)[:80]!r}.") from None
    if type(parts) is not list or len(parts) < 2 or type(parts[0]) is not int:
        raise WireError(f"expected a frame as [version, type, ...], got {describe(parts)}.")
    version, number, *values = parts
    if version != VERSION:
        raise WireError(
            f"a frame of protocol version {version}; this side speaks version {VERSION}. Update the older of the two.",
            "protocol",
        )
    known = type(number) is int and 0 <= number < len(MESSAGES)
    if not known or MESSAGES[number] not in allowed:
        got = name(MESSAGES[number]) if known else f"type {describe(number)}"
        raise WireError(f"expected a frame of {', '.join(map(name, allowed))}, got {got}.")
    cls: type[M] = next(one for one in allowed if one is MESSAGES[number])
    kinds = _KINDS[cls]
    if len(values) != len(kinds):
        names = ", ".join(part for part, _ in kinds) or "none"
        raise WireError(f"{name(cls)}: expected {len(kinds)} fields ({names}), got {len(values)}.")
    read = [_unpack(cls, part, kind, v) for (part, kind), v in zip(kinds, values, strict=True)]
    return cls(*read)


def _unpack(cls: type, part: str, kind: Any, value: Any) -> Any:
    try:
        return kind.unpack(value)
    except Unfit as error:
        raise WireError(f"{name(cls)}.{part}: {error}.") from None


def ending(token: int, stop: np.ndarray, left: int, room: int) -> str:
    """What comes after a token (ENDS); both sides ask this of tokens that the device chose.

    Args:
        left: how many tokens were still wanted, this one included.
        room: how many more tokens the session may read.
    """
    if token in stop:
        return "stop"
    if left <= 1:
        return "limit"
    return "more" if room >= 1 else "full"
