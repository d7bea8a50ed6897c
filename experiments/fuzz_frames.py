"""Throw mutated frames at the decoders of both ends: nothing but messages and WireErrors comes out, nothing grows.

    python experiments/fuzz_frames.py                    # 1,000,000 frames
    python experiments/fuzz_frames.py --frames 20000

Valid frames of every kind are cut, spliced, repeated, and have bits, bytes and lengths changed; in half of them values
are changed instead, so that msgpack still reads them; a tenth is noise. Each goes to the decoder of the cloud and to
that of the device. The first exception of another class ends the run with the frame in hex. Outcomes and memory are
written to results/fuzz_frames.json.
"""

from __future__ import annotations

import json
import random
import re
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import tyro

from spa_jax.errors import WireError
from spa_jax.fields import CODINGS
from spa_jax.wire import (
    FROM_CLOUD,
    FROM_DEVICE,
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

RESULT = Path(__file__).parent / "results" / "fuzz_frames.json"


@dataclass(frozen=True)
class Options:
    """How many frames, and which."""

    frames: int = 1_000_000
    seed: int = 0


def valid_frames() -> list[bytes]:
    rng = np.random.default_rng(0)
    none = np.array([], np.int32)
    hello = Hello(
        "f" * 64, "spa", 0.5, "lazy", np.arange(3), "cloud", None, rng.normal(size=(9, 2)), "fp32", 40.0, 2**20
    )
    plain = [
        hello,
        Welcome("s1", "f" * 64, 49152, 576, 1024, 2**20, 30.0),
        Prefill(np.arange(20), 30, np.array([2])),
        Resume(np.arange(20), 7, 30, none),
        Step(5, 17),
        Token(49151, "more"),
        Error("busy", "all slots are taken"),
        Bye(),
    ]
    frames = [encode(message) for message in plain]
    for coding in CODINGS:
        for positions in ([7], [7, 8, 9], [1, 5, 6]):
            taps = rng.normal(size=(4, len(positions), 8)).astype(np.float32)
            frames.append(encode(Taps(np.array(positions), True, taps, taps[0, 0]), coding))
        frames.append(encode(SideState(5, rng.normal(size=8)), coding))
    return frames


def mutate(data: bytearray, frames: list[bytes], rng: random.Random) -> bytes:
    """One to four changes."""
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice(
                b"\x00\x7f\x80\x90\x9f\xa0\xc0\xc1\xc4\xc6\xc7\xca\xcb\xcf\xd3\xdb\xdc\xdd\xdf\xe0\xff"
            )
        elif kind == 2:
            data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 5:
            other = rng.choice(frames)
            data[at:] = other[rng.randrange(len(other)) :]
        elif kind == 6:  # a length that lies
            data[at : at + 5] = rng.choice(b"\xc6\xc9\xdb\xdd\xdf").to_bytes(1, "big") + rng.randbytes(4)
        elif at > 1 and len(data) > 2:  # another version or type
            data[rng.randint(1, 2)] = rng.randrange(16)
    return bytes(data)


def revalue(parts: list, rng: random.Random) -> list:
    """One value, at any depth, exchanged, left out or doubled."""
    parts = list(parts)
    at = rng.randrange(len(parts)) if parts else 0
    if parts and isinstance(parts[at], list) and rng.random() < 0.8:
        parts[at] = revalue(parts[at], rng)
    elif parts and isinstance(parts[at], bytes) and rng.random() < 0.5:
        parts[at] = mutate(bytearray(parts[at]), [parts[at] or b"\0"], rng)
    else:
        new = (None, True, -1, 0, 3, 255, 2**31, 2**63, 0.5, float("nan"), "", "x" * 2000, b"", b"\0" * 9, [], [0, 1])
        parts[at : at + rng.randint(0, 1)] = rng.choices(new, k=rng.randint(0, 2))
    return parts


def outcome(data: bytes, allowed: tuple[type, ...]) -> str:
    """What a decoder made of a frame, numbers and names of libraries left out."""
    try:
        message = decode(data, allowed)
    except WireError as error:
        text = re.sub(r"[\d.'\"]+", "#", str(error))
        return f"{error.code}: " + re.split(r", got|: expected| expected", text)[0][:60]
    encode(message)
    return f"message: {name(type(message))}"


def resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(options: Options) -> None:
    rng, frames = random.Random(options.seed), valid_frames()
    counts, largest, memory, begin = Counter(), 0, [], time.time()
    for i in range(options.frames):
        if i % max(options.frames // 20, 1) == 0:
            memory.append(resident())
        frame = rng.choice(frames)
        if i % 10 == 0:
            data = rng.randbytes(rng.randrange(200))
        elif i % 2:
            data = mutate(bytearray(frame), frames, rng)
        else:
            data = msgpack.packb(revalue(msgpack.unpackb(frame), rng))
        largest = max(largest, len(data))
        for end, allowed in (("cloud", FROM_DEVICE), ("device", FROM_CLOUD)):
            try:
                counts[f"{end}: {outcome(data, allowed)}"] += 1
            except Exception as error:
                raise SystemExit(f"frame {i}: {type(error).__name__}: {error}\n{data.hex()}") from error
    memory.append(resident())
    seconds = time.time() - begin
    result = {
        "frames": options.frames,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "frames_per_second": round(options.frames / seconds),
        "largest_frame": largest,
        "memory_mb": [round(m / 2**20, 1) for m in memory],
        "growth_mb_after_warmup": round((memory[-1] - memory[2]) / 2**20, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "outcomes": dict(counts.most_common()),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "outcomes"}))
    print(f"{len(counts)} kinds of outcome, no other exception; {RESULT.name} has them")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
