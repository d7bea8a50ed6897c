"""Frames: what is sent arrives; nothing else does, whatever the bytes; what frames cost."""

import dataclasses
import re
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spa_jax.errors import WireError
from spa_jax.fields import CODINGS, expand, squeeze
from spa_jax.wire import (
    ERRORS,
    FROM_CLOUD,
    FROM_DEVICE,
    MESSAGES,
    VERSION,
    Bye,
    Error,
    Hello,
    Prefill,
    Resume,
    SideState,
    Step,
    Taps,
    Token,
    Welcome,
    decode,
    encode,
    name,
)

RNG = np.random.default_rng(0)
TAPS = RNG.normal(size=(3, 2, 8)).astype(np.float32)
G = RNG.normal(size=8).astype(np.float32)
GATE = RNG.normal(size=(9, 2)).astype(np.float32)
HELLO = Hello("f00d", "spa", 0.5, "lazy", np.array([1, 3]), "cloud", None, GATE, "fp32", None, 2**20)
EXAMPLES = [
    HELLO,
    dataclasses.replace(HELLO, public="wiki", gate=None, budget=40.0, coding="int8"),
    Welcome("s1", "f00d", 53, 24, 128, 2**20, 30.0),
    Prefill(np.array([5, 9, 11]), 30, np.array([7])),
    Resume(np.array([5, 9, 11, 4]), 2, 29, np.array([], np.int32)),
    Taps(np.array([4, 5]), True, TAPS, G),
    Taps(np.array([4, 9]), False, TAPS, None),
    SideState(5, G),
    Step(5, 17),
    Token(49151, "more"),
    Error("busy", "all slots are taken"),
    Bye(),
]
FRAMES = [encode(message) for message in EXAMPLES]


def same(a, b) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return type(a) is type(b) and all((x is None) == (y is None) and np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: name(type(m)))
def test_what_is_sent_arrives(message):
    back = decode(encode(message))
    assert same(back, message) and encode(back) == encode(message)
    assert {type(m) for m in EXAMPLES} == set(MESSAGES) == {*FROM_DEVICE, *FROM_CLOUD}


floats = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.floats(-4e4, 4e4, width=32)
)


def hartley(x):
    """As docs/protocol.md defines it."""
    n = np.arange(x.shape[-1])
    angle = 2 * np.pi / len(n) * np.outer(n, n)
    return x @ (np.cos(angle) + np.sin(angle)) / np.sqrt(len(n))


def test_int8_bears_outliers():
    """One channel forty times the others costs them nothing: the error stays that of a vector without one."""
    plain = np.random.default_rng(0).standard_normal((1, 64, 576)).astype(np.float32)
    spiked = plain.copy()
    spiked[..., 7] = 40
    errors = [np.sqrt(((expand(squeeze(x, "int8")) - x) ** 2).mean()) for x in (plain, spiked)]
    assert errors[1] < 1.5 * errors[0] < 0.02


@given(floats, st.sampled_from(CODINGS))
def test_codings(taps, coding):
    """Each is as near as it promises, keeps each vector's own scale, and loses nothing the second time."""
    message = Taps(np.arange(taps.shape[1]), True, taps, None)
    back = decode(encode(message, coding)).taps
    near = {"fp32": 0, "fp16": 2**-11, "int8": 2**0.5 / 254}[coding]
    floor = {"fp32": 0, "fp16": 2**-24, "int8": 2**-21}[coding]
    sent, came = (hartley(taps), hartley(back)) if coding == "int8" else (taps, back)
    assert (np.abs(came - sent) <= near * np.abs(sent).max(-1, keepdims=True) * (1 + 1e-4) + floor).all()
    np.testing.assert_array_equal(decode(encode(dataclasses.replace(message, taps=back), coding)).taps, back)
    np.testing.assert_array_equal(expand(squeeze(taps, coding)), back)


@pytest.mark.parametrize(
    ("coding", "value", "expected"),
    [("fp16", 1e5, "do not fit in fp16"), ("int8", 1e9, "do not fit in int8"), ("fp32", np.nan, "not finite")],
)
def test_values_that_a_coding_cannot_hold(coding, value, expected):
    with pytest.raises(WireError, match=expected):
        encode(SideState(5, np.array([1.0, value], np.float32)), coding)


def frame(*parts, version=VERSION):
    return msgpack.packb([version, *parts])


def number(cls):
    return MESSAGES.index(cls)


ARRAY = [0, [8], G.tobytes()]
BAD = {
    "empty": (b"", "not a frame"),
    "text": ("hello", "expected a binary frame, got a text frame"),
    "no msgpack": (b"\xc1\x00", "not a frame"),
    "more behind it": (FRAMES[0] + b"\x00", "not a frame: msgpack says ExtraData"),
    "cut": (FRAMES[0][:-1], "not a frame"),
    "a map": (msgpack.packb({1: 2}), "not a frame"),
    "a number": (msgpack.packb(7), r"expected a frame as \[version, type, ...\], got 7"),
    "nested": (b"\x91" * 4000 + b"\x00", "not a frame"),
    "bad utf-8": (
        bytes([0x94, VERSION, number(Error), 0]) + b"\xa2\xff\xff",
        "not a frame: msgpack says UnicodeDecodeError",
    ),
    "other version": (frame(number(Bye), version=1), "protocol version 1; this side speaks version 2"),
    "no type": (frame(99), "expected a frame of hello, welcome, .*, got type 99"),
    "missing": (frame(number(Token), 5), r"token: expected 2 fields \(token, end\), got 1"),
    "extra": (frame(number(Bye), 5), r"bye: expected 0 fields \(none\), got 1"),
    "float id": (frame(number(Token), 5.0, 0), "token.token: expected a whole number .*, got 5.0"),
    "bool id": (frame(number(Token), True, 0), "token.token: expected a whole number .*, got True"),
    "negative id": (frame(number(Token), -1, 0), "token.token: expected a whole number from 0"),
    "large id": (frame(number(Token), 2**31, 0), "token.token: expected a whole number from 0 to 2147483647"),
    "no such end": (frame(number(Token), 5, 4), "token.end: expected the number of one of more, stop, limit, full"),
    "long text": (frame(number(Error), 0, "x" * 1001), "error.message: expected text of at most 1000 characters"),
    "no array": (frame(number(SideState), 5, "x"), r"side_state.g: expected an array as \[dtype, shape, bytes\]"),
    "int for float": (frame(number(SideState), 5, [3, [8], G.tobytes()]), "side_state.g: .* dtype of fp32, fp16, int8"),
    "float for int": (frame(number(Prefill), ARRAY, 1, [3, [0], b""]), "prefill.tokens: .* dtype of int32, got 0"),
    "too few bytes": (
        frame(number(SideState), 5, [0, [9], G.tobytes()]),
        r"36 bytes of fp32 \[9\], got bytes of .* 32",
    ),
    "two axes": (frame(number(SideState), 5, [0, [2, 4], G.tobytes()]), r"side_state.g: expected floats .*\[131072\]"),
    "empty array": (frame(number(Prefill), [3, [0], b""], 1, [3, [0], b""]), "no shorter than 1"),
    "huge": (frame(number(SideState), 5, [0, [2**40], b""]), "side_state.g: expected floats"),
    "nan": (frame(number(SideState), 5, [0, [1], np.float32(np.nan).tobytes()]), "expected finite numbers"),
    "negative token": (frame(number(Prefill), [3, [1], b"\xff" * 4], 1, [3, [0], b""]), "numbers from 0"),
    "positions back": (frame(number(Taps), [5, 4], True, ARRAY, None), "taps.positions: expected first <= last"),
    "many positions": (frame(number(Taps), [0, 2**30], True, ARRAY, None), "at most 131072 positions"),
    "positions twice": (
        frame(number(Taps), [3, [2], b"\x01\0\0\0\x01\0\0\0"], True, [0, [1, 2, 4], G.tobytes()], None),
        "ascending positions",
    ),
    "other positions": (
        frame(number(Taps), [5, 6], True, [0, [1, 1, 8], G.tobytes()], None),
        "2 positions, but .* of 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_frame_is_refused_with_what_was_expected(case):
    data, expected = BAD[case]
    with pytest.raises(WireError, match=expected) as error:
        decode(data)
    assert error.value.code == ("protocol" if case == "other version" else "bad-frame") and error.value.code in ERRORS


def test_each_side_hears_only_what_the_other_may_say():
    with pytest.raises(WireError, match="expected a frame of welcome, taps, token, error, got step"):
        decode(encode(Step(5, 17)), FROM_CLOUD)
    with pytest.raises(WireError, match=r"expected a frame of hello, .* got token"):
        decode(encode(Token(5, "more")), FROM_DEVICE)


def test_large_frames_are_refused_unread():
    with pytest.raises(WireError, match="2001 bytes: expected at most 2000") as error:
        decode(b"\xc1" * 2001, frame_bytes=2000)
    assert error.value.code == "too-large"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Token(-1, "more"), "token.token: expected a whole number"),
        (Token(1, "over"), "token.end: expected one of more"),
        (Prefill(np.array([0.5]), 1, np.array([], int)), "prefill.tokens: expected int32"),
        (Prefill(np.array([], int), 1, np.array([], int)), "prefill.tokens: .* no shorter than 1"),
        (Error("oops", ""), "error.code: expected one of auth"),
        (dataclasses.replace(HELLO, threshold=float("inf")), "hello.threshold: expected a finite float"),
    ],
)
def test_what_is_sent_is_checked_too(message, expected):
    with pytest.raises(WireError, match=expected):
        encode(message)


@given(st.binary(max_size=200))
def test_random_bytes(data):
    try_decode(data)


@st.composite
def mutated(draw):
    """A valid frame with bytes changed, cut out, put in or repeated."""
    data = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@given(mutated())
def test_mutated_frames(data):
    try_decode(data)


@given(
    st.recursive(
        st.none() | st.integers(-3, 300) | st.binary(max_size=9) | st.floats() | st.text(max_size=3),
        lambda x: st.lists(x, max_size=5),
    ),
    st.integers(0, 9),
)
def test_well_formed_nonsense(values, kind):
    """msgpack that is not ours, also with a right head."""
    try_decode(msgpack.packb(values))
    values = values if isinstance(values, list) else [values]
    try_decode(frame(kind, *values))
    try_decode(frame(kind, *(values + [None] * 11)[: len(dataclasses.fields(MESSAGES[kind]))]))


def try_decode(data):
    """A message that can be sent again, or one WireError."""
    try:
        message = decode(data)
    except WireError as error:
        assert len(str(error)) < 600
    else:
        encode(message)


def test_bytes_of_a_gated_token_of_llama_7b():
    """32 layers tapped and the input, width 32 (the plugin), projected in the cloud; what the project promises."""
    rng = np.random.default_rng(0)
    sized = lambda width, coding: len(  # noqa: E731
        encode(Taps(np.array([1500]), True, rng.normal(size=(33, 1, width)).astype(np.float32), None), coding)
    )
    assert sized(32, "int8") <= 1100
    assert sized(32, "fp16") <= 2.1e3 + 50 and sized(4096, "fp16") <= 270.4e3
    assert len(encode(Token(31999, "more"))) <= 8  # all that a token costs when the gate is 0


def test_the_protocol_is_described():
    """docs/protocol.md names every message by its number, every field, every error."""
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = {row.split("|")[2].strip(" `"): row for row in text.splitlines() if re.match(r"\| \d+ \|", row)}
    assert list(rows) == [name(cls) for cls in MESSAGES]
    for i, cls in enumerate(MESSAGES):
        row = rows[name(cls)]
        assert row.startswith(f"| {i} |")
        assert all(f"`{field.name}`" in row for field in dataclasses.fields(cls))
        sender = "either" if cls in FROM_CLOUD and cls in FROM_DEVICE else "cloud" if cls in FROM_CLOUD else "device"
        assert row.split("|")[3].strip() == sender
    assert f"Version {VERSION}." in text and all(f"`{code}`" in text for code in ERRORS)
