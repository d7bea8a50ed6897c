"""A cloud's and a device's model in a few integers, without jax: every text depends on all that has to arrive.

The base's token, the gate and the activations of a position depend on all tokens before it; g on all activations that
the device has seen, and on its secret. Integers all the way, so that fp32 and fp16 lose nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from spa_jax.engine import Read
from spa_jax.errors import PluginError
from spa_jax.wire import ENDS, Hello, ending

D, N, VOCAB, LAYERS, FINGERPRINT = 8, 3, 101, 6, "base-1"
GATE = np.zeros((D + 1, 2), np.float32)
WEIGHTS = np.arange(1, D + 1)


def hello(**changes) -> Hello:
    terms = {"model": FINGERPRINT, "setting": "spa", "threshold": 0.5, "memory": "lazy", "taps": np.array([1, 3, 5])}
    terms |= {"head": "cloud", "public": None, "gate": GATE, "coding": "fp32", "budget": None, "frame_bytes": 2**16}
    return Hello(**{**terms, **changes})


def read_one(history: list[int]) -> tuple[int, float, np.ndarray, np.ndarray]:
    """(base token, gate, taps [N + 1, D], f [D]) of the last position of a history."""
    code = 7
    for token in history:
        code = (code * 31 + token + 1) % 10007
    f = (code // np.arange(1, D + 1)) % 11
    taps = (code + np.arange((N + 1) * D).reshape(N + 1, D) * (1 + code % 5)) % 13
    return int(f @ WEIGHTS) % VOCAB, (code % 10) / 10, taps.astype(np.float32), f.astype(np.float32)


def choose(f: np.ndarray, g: np.ndarray) -> int:
    return int((f + g) @ WEIGHTS) % VOCAB


@dataclass
class FakeCloud:
    slots: int = 4
    context: int = 64
    fingerprint: str = FINGERPRINT
    vocab: int = VOCAB
    embed: int = D
    layers: int = LAYERS
    chunk: int = 3
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    fails: bool = False

    def __post_init__(self):
        self.histories = [[] for _ in range(self.slots)]
        self.terms = [None] * self.slots

    def open(self, slot, terms):
        if terms.public not in (None, "half"):
            raise PluginError(f"no public Down of the name {terms.public!r}; there is: half.")
        self.histories[slot], self.terms[slot] = [], terms

    def extend(self, slot, tokens):
        reads = [self._one(slot, token) for token in tokens]
        gate, taps = np.concatenate([r.gate for r in reads]), np.concatenate([r.taps for r in reads], 1)
        return Read(reads[-1].token, gate, taps, reads[-1].hidden)

    def step(self, slots, tokens):
        self.batches.append(len(slots))
        assert len(set(slots)) == len(slots)
        time.sleep(self.seconds)
        return [self._one(slot, token) for slot, token in zip(slots, tokens, strict=True)]

    def _one(self, slot, token):
        if self.fails:
            raise RuntimeError("out of memory")
        self.histories[slot].append(token)
        assert len(self.histories[slot]) <= self.context
        token, gate, taps, f = read_one(self.histories[slot])
        if self.terms[slot].public:
            taps = taps[:, : D // 2]
        return Read(token, np.array([gate]), taps[:, None], f)

    def finish(self, slots, g):
        return [choose(read_one(self.histories[slot])[3], row) for slot, row in zip(slots, g, strict=True)]


@dataclass
class FakeDevice:
    """State: (positions seen, sum of what was seen of them)."""

    secret: int = 3
    wants: dict = field(default_factory=dict)
    weights: np.ndarray = field(default_factory=lambda: np.random.default_rng(5).normal(size=(64, 64)).astype("f4"))

    def terms(self):
        return hello(**self.wants)

    def start(self):
        return (0, 0)

    def side(self, state, taps, positions):
        count, total = state
        if self.terms().memory == "lazy":
            assert positions.tolist() == list(range(count, count + len(positions)))
        if self.terms().memory == "stateless":
            assert len(positions) == 1
            total = 0
        total = (total + taps[..., : D // 2].sum((0, 1))) % 97
        g = np.tile(total * self.secret % 13, 2).astype(np.float32)
        return g, (count + len(positions), total)

    def choose(self, hidden, g):
        return choose(hidden, g)


def solo(prompt, limit, stop=(), device=None, context=64):
    """The text as one process writes it: (tokens, stop token included; where the side was used; end)."""
    device = device or FakeDevice()
    terms, history, seen, state, texts, used = device.terms(), list(prompt), 0, device.start(), [], []
    gated = terms.setting in ("spa", "s2")
    for left in range(limit, 0, -1):
        token, gate, _, f = read_one(history)
        use = not gated or gate >= terms.threshold
        if use:
            places = range(seen, len(history))
            if terms.memory == "stateless":
                places = places[-1:]
            if terms.memory == "sparse":
                places = [i for i in places if read_one(history[: i + 1])[1] >= terms.threshold]
            taps = np.stack([read_one(history[: i + 1])[2] for i in places], 1)
            g, state = device.side(state, taps, np.array(places))
            token, seen = choose(f, g), len(history)
        end = ending(token, np.array(stop), left, context - len(history))
        history.append(token)
        texts.append(token)
        used.append(use)
        if end != "more":
            break
    assert end in ENDS
    return texts, used, end
