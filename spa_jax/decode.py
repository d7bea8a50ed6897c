"""Continue texts with base, gate and side network: on one machine as one loop, or apart, as cloud and device do.

:func:`generate` is the fast way: a ``while_loop`` over :func:`mlfs_jax.generate.decode` or its beam search, in which
the side network runs at every step. With "lazy" memory that is what it would have computed piece by piece.

:class:`Split` is the honest way: the cloud decides, what the memory policy keeps waits in a :class:`Mailbox`, and the
device runs when it is needed. It composes :func:`cloud_step`, :func:`device_step` and :func:`cloud_finish` and nothing
else, so whoever puts a network between them computes the same; and it counts the round trips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.cache import Cache, init_cache
from mlfs_jax.errors import ConfigError
from mlfs_jax.generate import GenerateConfig, Network, beam_search, bucket, decode
from mlfs_jax.generate import reorder as reorder_cache
from mlfs_jax.generate.session import Prompts, as_rows, check_prompts, cut_at_end, left_pad
from mlfs_jax.model import Model
from spa_jax.gate import choose
from spa_jax.model import cloud_finish, cloud_step
from spa_jax.seam import Frame, Setting
from spa_jax.side import Side, SideCache, device_step, init_side_cache

GREEDY = GenerateConfig()


@partial(jax.tree_util.register_dataclass, data_fields=["cloud", "device"], meta_fields=[])
@dataclass(frozen=True)
class Memory:
    """What cloud and device remember of B texts."""

    cloud: Cache
    device: SideCache | None


@dataclass(frozen=True)
class SideGenerated:
    """The continuations of B prompts, and who chose what.

    Attributes:
        tokens: the new tokens of each, without the stop token.
        finished: [B], whether a stop token ended it.
        sigma: for each new token, stop token included: whether the side network was used.
        differs: whether base and side network would have chosen different tokens there.
        gate: the gate's probability there.
    """

    tokens: list[list[int]]
    finished: Bool[np.ndarray, " B"]
    sigma: list[list[bool]]
    differs: list[list[bool]]
    gate: list[list[float]]

    def rates(self) -> dict[str, float]:
        """Over all new tokens: ``usage`` of the side network; ``diff``, how often the two sides disagree; ``pick``, how
        often the side network is used where they do (SPA, Table 7)."""
        sigma, differs = np.concatenate(self.sigma), np.concatenate(self.differs)
        return rates(sigma, differs)


def rates(sigma: Bool[np.ndarray, " M"], differs: Bool[np.ndarray, " M"]) -> dict[str, float]:
    """``usage``, ``diff`` and ``pick`` of tokens; ``pick`` is 0 where the sides never differ."""
    return {
        "usage": float(sigma.mean()),
        "diff": float(differs.mean()),
        "pick": float(sigma[differs].mean()) if differs.any() else 0.0,
    }


@dataclass(frozen=True)
class _Halves:
    """The three halves of a step with all that does not change bound to them; built anew within each trace."""

    graphdef: nnx.GraphDef
    base: nnx.State
    side: Side
    setting: Setting
    threshold: float | Array

    def read(self, memory: Memory, tokens: Int[Array, "B T"], real: Bool[Array, "B T"], *, everywhere: bool = False):
        """(f, g, p, sigma) of T more tokens, and the memory with them in it.

        With "sparse" memory g is defined where sigma is 1; ``everywhere`` computes it at every position, as if only
        this one were sent, too. That memory is not to be read on from.
        """
        batch = {"input_ids": tokens, "attention_mask": real}
        gate = self.side.gate if self.setting.gated else {}
        cloud = cloud_step(self.graphdef, self.base, gate, memory.cloud, batch, tapped=self.side.tapped)
        sigma = choose(cloud.gate, self.threshold if self.setting.gated else 0.0)
        frame, seen = cloud.frame, None
        if self.side.config.memory == "sparse" and everywhere:
            seen = sigma
        elif self.side.config.memory == "sparse":
            frame = frame.replace(real=frame.real & sigma)
        g, device = device_step(self.side, memory.device, frame, seen=seen)
        return (cloud.hidden, g, cloud.gate, sigma), Memory(cloud.cache, device)

    def step(self, memory: Memory, tokens: Int[Array, " B"], alive: Bool[Array, " B"]):
        """A step function for :func:`mlfs_jax.generate.decode`."""
        (f, g, _, sigma), memory = self.read(memory, tokens[:, None], alive[:, None])
        return self.logits(f, g, sigma)[:, 0], memory

    def logits(self, f, g, sigma) -> Float[Array, "B T V"]:
        return cloud_finish(self.graphdef, self.base, f, g, sigma, setting=self.setting)


_STATIC = ("graphdef", "setting")


@partial(jax.jit, static_argnames=_STATIC, donate_argnames="memory")
def _prefill(graphdef, base, side, setting, threshold, memory: Memory, tokens, real) -> Memory:
    return _Halves(graphdef, base, side, setting, threshold).read(memory, tokens, real)[1]


@partial(jax.jit, static_argnames=(*_STATIC, "room"))
def _greedy(graphdef, base, side, setting, threshold, memory: Memory, first, *, room, limit, stop):
    step = _Halves(graphdef, base, side, setting, threshold).step
    return decode(step, memory, first, room=room, limit=limit, stop=stop, key=jax.random.key(0))[1]


@partial(jax.jit, static_argnames=(*_STATIC, "room", "beams"))
def _beams(graphdef, base, side, setting, threshold, memory, first, *, beams, room, limit, stop, length_penalty):
    step = _Halves(graphdef, base, side, setting, threshold).step
    found = beam_search(
        step,
        memory,
        first,
        reorder=_reorder,
        beams=beams,
        room=room,
        limit=limit,
        stop=stop,
        length_penalty=length_penalty,
    )
    return found[0]


def _reorder(memory: Memory, rows: Int[Array, " rows"]) -> Memory:
    device = memory.device
    if device is not None:
        stacked = (device.k[:, rows], device.v[:, rows])
        device = SideCache(*stacked, device.valid[rows], device.positions[rows], device.length[rows])
    return Memory(reorder_cache(memory.cloud, rows), device)


@partial(jax.jit, static_argnames=_STATIC)
def _trace(graphdef, base, side, setting, threshold, memory: Memory, tokens, real):
    """Who chose each next token of given texts: (p, sigma, whether the two sides' first choices differ)."""
    halves = _Halves(graphdef, base, side, setting, threshold)
    (f, g, p, sigma), _ = halves.read(memory, tokens, real, everywhere=True)
    every = jnp.ones_like(sigma)
    ours, theirs = halves.logits(f, g, every), halves.logits(f, g, ~every)
    return p, sigma, ours.argmax(-1) != theirs.argmax(-1)


def generate(
    model: Model,
    side: Side,
    prompts: Prompts,
    config: GenerateConfig = GREEDY,
    *,
    setting: str = "spa",
    threshold: float = 0.5,
) -> SideGenerated:
    """Continue every prompt, greedily or by beam search.

    Args:
        model: the decoder that ``side`` was made for.
        prompts: token ids of each; or ``input_ids`` and ``attention_mask`` [B, T], padded on any side.
        config: beams, lengths, stop tokens; no sampling.
        setting: see :class:`Setting`.
        threshold: of the gate.

    Raises:
        ConfigError: as :func:`mlfs_jax.generate.generate`; or a temperature.
        PluginError: the side network was made for another backbone.
    """
    if config.temperature:
        raise ConfigError(f"temperature = {config.temperature}: with a side network texts are not sampled; leave it 0.")
    side.check(model.decoder)
    network, rows, setting = Network(model), as_rows(prompts), Setting.parse(setting)
    stop, limit = network.stop(config.stop_tokens), config.max_new_tokens
    check_prompts(network, rows, [0] * len(rows), limit)
    B, width, room = len(rows), bucket(max(len(row) for row in rows) - 1), bucket(limit)
    memory = Memory(init_cache(model.decoder, B, width + room, network.dtype), init_side_cache(side, B, width + room))
    which = (model.graphdef, model.base, side, setting, jnp.float32(threshold))
    if width:
        tokens, real = left_pad([row[:-1] for row in rows], width, model.config.pad_token_id)
        memory = _prefill(*which, memory, tokens, real)
    first = np.asarray([row[-1] for row in rows], np.int32)
    common = {"room": room, "limit": np.int32(limit), "stop": stop}
    if config.beams > 1:
        penalty = np.float32(config.length_penalty)
        out = _beams(*which, memory, first, beams=config.beams, length_penalty=penalty, **common)
    else:
        out = _greedy(*which, memory, first, **common)
    out = np.asarray(out)
    written, finished = cut_at_end(out, stop)
    read = np.concatenate([first[:, None], out[:, :-1]], 1)
    p, sigma, differs = _trace(*which, memory, np.maximum(read, 0), out >= 0)
    lists = lambda x: [row[: len(new)].tolist() for row, new in zip(np.asarray(x), written, strict=True)]  # noqa: E731
    shown = [new[:-1] if ended else new for new, ended in zip(written, finished, strict=True)]
    return SideGenerated(shown, np.asarray(finished), lists(sigma), lists(differs), lists(p))


class Mailbox:
    """In the cloud, for each of B texts: what the device has not been sent yet, and may have to be.

    "lazy": everything since the last delivery. "sparse": the positions that the gate chose. "stateless": of the newest
    position only.
    """

    def __init__(self, memory: str, batch: int):
        self.memory = memory
        self.waiting: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(batch)]

    def add(self, frame: Frame, sigma: Bool[np.ndarray, "B T"]) -> None:
        """Keep what the policy keeps of a frame."""
        taps, positions, real = (np.asarray(x) for x in (frame.taps, frame.positions, frame.real))
        keep = real & np.asarray(sigma) if self.memory == "sparse" else real
        for b, waiting in enumerate(self.waiting):
            if self.memory == "stateless":
                waiting.clear()
            waiting += [(taps[:, b, t], int(positions[b, t])) for t in np.flatnonzero(keep[b])]
            if self.memory == "stateless":
                del waiting[:-1]

    def collect(self, due: Bool[np.ndarray, " B"]) -> Frame | None:
        """All that waits for the texts that are due, as one frame padded on the right; None if nothing is sent."""
        rows = [waiting if now else [] for waiting, now in zip(self.waiting, due, strict=True)]
        T = max(len(row) for row in rows)
        if not T:
            return None
        width = 1 << (T - 1).bit_length()  # few widths: each is a compile
        one = next(row[0][0] for row in rows if row)
        taps = np.zeros((one.shape[0], len(rows), width, one.shape[1]), one.dtype)
        positions, real = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for b, row in enumerate(rows):
            for t, (tap, position) in enumerate(row):
                taps[:, b, t], positions[b, t], real[b, t] = tap, position, True
            if row:
                self.waiting[b].clear()
        return Frame(jnp.asarray(taps), jnp.asarray(positions), jnp.asarray(real))


class Split:
    """Cloud and device in one process, exchanging frames only: what a network between them has to reproduce.

    Attributes:
        round_trips: [B], exchanges of each text so far.
        sent: [B], positions whose activations went down.
    """

    def __init__(
        self,
        model: Model,
        side: Side,
        batch: int,
        capacity: int,
        *,
        setting: str = "spa",
        threshold: float = 0.5,
    ):
        side.check(model.decoder)
        self.model, self.side, self.setting, self.threshold = model, side, Setting.parse(setting), threshold
        self.capacity, self.held = capacity, 0
        self.cache = init_cache(model.decoder, batch, capacity)
        self.mailbox = Mailbox(side.config.memory, batch)
        self.side_cache = init_side_cache(side, batch, 2 * bucket(capacity))  # a frame's padding needs room, too
        self.round_trips, self.sent = np.zeros(batch, int), np.zeros(batch, int)

    def read(
        self,
        tokens: Int[np.ndarray, "B T"],
        real: Bool[np.ndarray, "B T"],
        sigma: Bool[np.ndarray, "B T"] | None = None,
    ) -> Float[Array, "B V"]:
        """Read T more tokens of each text (padding on the left); logits of what comes behind the last one.

        ``sigma`` overrides the gate.
        """
        self.held += tokens.shape[1]
        if self.held > self.capacity:
            raise ConfigError(f"capacity = {self.capacity}: expected room for the {self.held} positions read so far.")
        graphdef, base, gate = self.model.graphdef, self.model.base, self.side.gate if self.setting.gated else {}
        batch = {"input_ids": jnp.asarray(tokens), "attention_mask": jnp.asarray(real)}
        cloud = cloud_step(graphdef, base, gate, self.cache, batch, tapped=self.side.tapped)
        self.cache = cloud.cache
        if sigma is None:
            sigma = np.asarray(choose(cloud.gate, self.threshold if self.setting.gated else 0.0))
        self.mailbox.add(cloud.frame, sigma)
        due = np.asarray(sigma)[:, -1] & np.asarray(real)[:, -1]
        f = cloud.hidden[:, -1:]
        g = jnp.zeros_like(f)
        if due.any():
            frame = self.mailbox.collect(due)
            states, self.side_cache = device_step(self.side, self.side_cache, frame)
            count = np.asarray(frame.real).sum(1)
            self.round_trips += due
            self.sent += count
            g = jnp.take_along_axis(states, jnp.maximum(count - 1, 0)[:, None, None], 1)
        return cloud_finish(graphdef, base, f, g, jnp.asarray(due)[:, None], setting=self.setting)[:, 0]

    def generate(self, prompts: Sequence[Sequence[int]], config: GenerateConfig = GREEDY) -> list[list[int]]:
        """Continue every prompt greedily; the tokens of :func:`generate`.

        Raises:
            ConfigError: another number of prompts than texts, or something was read before: a Split writes once.
        """
        if self.held or len(prompts) != len(self.round_trips):
            raise ConfigError(
                f"{len(prompts)} prompts, {self.held} positions read before: expected {len(self.round_trips)} prompts "
                "in a fresh Split."
            )
        stop = Network(self.model).stop(config.stop_tokens)
        width = max(len(row) for row in prompts)
        tokens, real = left_pad([list(row) for row in prompts], width, self.model.config.pad_token_id)
        texts: list[list[int]] = [[] for _ in prompts]
        alive = np.ones(len(prompts), bool)
        for _ in range(config.max_new_tokens):
            token = np.asarray(self.read(tokens, real).argmax(-1), np.int32)
            alive &= ~stop[token]
            for b in np.flatnonzero(alive):
                texts[b].append(int(token[b]))
            if not alive.any():
                break
            tokens, real = token[:, None], alive[:, None]
        return texts
