"""One device's session in the cloud: the protocol of docs/protocol.md, from hello to bye."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.protocol import State

from spa_jax.budget import Pace
from spa_jax.engine import Engine, Read
from spa_jax.errors import MLFSError, PluginError, WireError
from spa_jax.fields import expand, squeeze
from spa_jax.wire import (
    FROM_DEVICE,
    Bye,
    Error,
    Hello,
    M,
    Message,
    Prefill,
    Resume,
    SideState,
    Step,
    Taps,
    Token,
    Welcome,
    decode,
    encode,
    ending,
)


class Refused(MLFSError):
    """The session ends, for a reason that the device is told; ``code`` as in an error frame."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Waiting:
    """What the device has not been sent yet and may have to be, squeezed as it will travel.

    "lazy" memory: everything since the last delivery. "sparse": the positions that the gate chose. "stateless": the
    newest position only.
    """

    def __init__(self, memory: str, coding: str):
        self.memory, self.coding = memory, coding
        self.positions: list[int] = []
        self.taps: list[np.ndarray] = []  # [n + 1, 1, ...] each

    def add(self, first: int, taps: np.ndarray, sigma: Sequence[bool] | np.ndarray, seen: int) -> None:
        """Keep what the policy keeps of T positions from ``first`` on, those below ``seen`` left out."""
        T = taps.shape[1]
        keep = [t for t in range(T) if first + t >= seen and (self.memory != "sparse" or sigma[t])]
        if self.memory == "stateless":
            keep = keep[-1:]
            self.clear()
        if keep:
            kept = squeeze(taps[:, keep], self.coding)
            self.positions += [first + t for t in keep]
            self.taps += [kept[:, [i]] for i in range(len(keep))]

    @property
    def nbytes(self) -> int:
        return len(self.taps) * self.taps[0].nbytes if self.taps else 0

    def collect(self, most: int, keep: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """All but the last ``keep`` positions, as (positions, taps) of at most ``most`` bytes each; they are gone."""
        end = len(self.taps) - keep
        count = max(1, most // (self.taps[0].nbytes + 8))
        parts = [
            (
                np.array(self.positions[i : min(i + count, end)]),
                expand(np.concatenate(self.taps[i : min(i + count, end)], 1)),
            )
            for i in range(0, end, count)
        ]
        del self.positions[:end], self.taps[:end]
        return parts

    def clear(self) -> None:
        self.positions.clear()
        self.taps.clear()


class Session:
    """A connection and, while it writes or rests between two texts, a slot of the engine.

    Attributes:
        doing: what it is at, for logs and errors.
    """

    def __init__(self, connection, engine: Engine, slots, config, name: str):
        self.connection, self.engine, self.slots, self.config, self.name = connection, engine, slots, config, name
        self.metrics, self.model = engine.metrics, engine.model
        self.slot: int | None = None
        self.doing = "waiting for hello"
        self.terms: Hello | None = None
        self._started = False  # a text
        self._carries_prompt = False  # the next round trip: it says nothing of what others take
        self._up = self._down = self._tokens = self._exchanges = 0

    def counts(self) -> dict[str, int]:
        """For the log."""
        return {"tokens": self._tokens, "exchanges": self._exchanges, "bytes_up": self._up, "bytes_down": self._down}

    # ------------------------------------------------------------------------------------------------- messages
    async def send(self, message: Message) -> None:
        data = encode(message, self.terms.coding)
        if len(data) > self.terms.frame_bytes:
            raise Refused(
                "too-large",
                f"a frame of {len(data)} bytes is needed, the device accepts {self.terms.frame_bytes}; raise its "
                "frame_bytes, or use a smaller coding or a public Down.",
            )
        async with asyncio.timeout(self.config.send_s):
            await self.connection.send(data)
        self._down += len(data)
        self.metrics.add("bytes_total", len(data), direction="down")

    async def receive(self, allowed: tuple[type[M], ...], timeout: float) -> M:
        """The next message; raises Refused when it is an error, and EOFError when it is a goodbye."""
        async with asyncio.timeout(timeout):
            data = await self.connection.recv()
        self._up += len(data)
        self.metrics.add("bytes_total", len(data), direction="up")
        message = decode(data, FROM_DEVICE, frame_bytes=self.config.frame_bytes)
        if isinstance(message, Bye):
            raise EOFError
        if isinstance(message, Error):
            raise Refused(message.code, "the device gave up.")
        return message if isinstance(message, allowed) else decode(data, allowed)  # which says what was expected

    async def say_error(self, code: str, message: str) -> None:
        """Tell the device, if it still listens, and close."""
        with suppress(ConnectionClosed, TimeoutError, OSError):
            data = encode(Error(code, message[:1000]))
            async with asyncio.timeout(min(1.0, self.config.send_s)):
                await self.connection.send(data)
            await self.connection.close(1008, code)

    # -------------------------------------------------------------------------------------------------- its life
    async def run(self) -> None:
        """From hello to bye."""
        with suppress(EOFError):
            await self._greet(await self.receive((Hello,), self.config.hello_s))
            while True:
                request = await self._next_text()
                self.engine.writing += 1
                try:
                    await self._write(request)
                finally:
                    self.engine.writing -= 1

    async def _greet(self, terms: Hello) -> None:
        if terms.model != self.model.fingerprint:
            raise Refused(
                "model",
                f"this plugin was made for the base {terms.model[:12]}, this server has {self.model.fingerprint[:12]}; "
                "connect to a server with its base (and its --base-bits), or fit a plugin for this one.",
            )
        taps = terms.taps
        if (np.diff(taps) <= 0).any() or taps[-1] >= self.model.layers:
            raise Refused("plugin", f"tapped layers: expected ascending ones below {self.model.layers}.")
        if terms.gate is not None and terms.gate.shape[0] != self.model.embed + 1:
            rows = self.model.embed + 1
            raise Refused(
                "plugin", f"gate: expected {rows} rows (a weight per channel, a bias), got {len(terms.gate)}."
            )
        if terms.setting in ("s2", "spa") and terms.gate is None and terms.public is None:
            raise Refused("plugin", f"setting {terms.setting} has a gate: send its weights, or name a public one.")
        self.terms = terms
        self.gated = terms.setting in ("s2", "spa")
        self.pace = Pace(terms.budget) if self.gated and terms.budget is not None else None
        self.waiting = Waiting(terms.memory, terms.coding)
        self.length = 0
        self.unread: list[int] = []
        model, config = self.model, self.config
        await self.send(
            Welcome(
                self.name,
                model.fingerprint,
                model.vocab,
                model.embed,
                model.context,
                config.frame_bytes,
                float(config.idle_s),
            )
        )

    async def _next_text(self) -> Prefill | Resume:
        """Wait for what to write next; the slot is given up on the way, when it takes long or another needs it."""
        self.doing = "waiting for a prompt"
        if self.slot is not None and self.slots.wanted:
            self.evict()
        elif self.slot is not None:
            self.slots.idle[self] = True
        listening: asyncio.Future[Prefill | Resume] = asyncio.ensure_future(
            self.receive((Prefill, Resume), self.config.linger_s)
        )
        try:
            done, _ = await asyncio.wait([listening], timeout=self.config.idle_s)
            if not done and self in self.slots.idle:
                self.evict()
            return await listening
        finally:
            listening.cancel()
            self.slots.idle.pop(self, None)

    def evict(self) -> None:
        """Lose the slot; the device will have to resume."""
        self.metrics.add("evictions_total")
        self.release()

    def release(self) -> None:
        """Give the slot back, if there is one."""
        self.slots.idle.pop(self, None)
        if self.slot is not None:
            self.metrics.add("sessions", -1)
            self.slots.release(self.slot)
            self.slot, self.length = None, 0
            self.waiting.clear()

    async def _take_slot(self) -> None:
        self.doing = "waiting for a slot"
        if self.slot is None:
            self.slot = await self.slots.acquire(self.config.queue_s)
            self.metrics.add("sessions", 1)
        try:
            await self.engine.open(self.slot, self.terms)
        except PluginError as error:
            raise Refused("plugin", str(error)) from None
        self.length, self.unread = 0, []
        self.waiting.clear()

    # --------------------------------------------------------------------------------------------------- writing
    async def _write(self, request: Prefill | Resume) -> None:
        """Continue a text until it ends, and tell the device every token of it."""
        resumed = isinstance(request, Resume)
        if not resumed and self.slot is None and self._started:
            await self.send(Error("evicted", "this session was idle and lost its place; resume it."))
            return
        if resumed or self.slot is None:
            await self._take_slot()
        tokens, seen = [*self.unread, *request.tokens.tolist()], request.seen if isinstance(request, Resume) else 0
        if max(tokens) >= self.model.vocab:
            raise WireError(f"tokens: expected ids below {self.model.vocab}, the size of the vocabulary.")
        if seen >= len(tokens) and resumed:
            raise WireError(f"resume.seen = {seen}: expected less than the {len(tokens)} tokens.")
        if self.length + len(tokens) > self.model.context:
            raise Refused(
                "too-long",
                f"{self.length + len(tokens)} tokens: a session here holds {self.model.context}; shorten the text.",
            )
        self._started = True
        self.doing = "reading a prompt"
        self.metrics.add("prompt_tokens_total", len(tokens))
        read = await self._read(tokens, seen)
        self.doing, self._carries_prompt = "writing", True
        begin = time.perf_counter()  # the prompt is not a part of the first token's time
        for left in range(request.limit, 0, -1):
            used = self._wants(float(read.gate[-1]), begin)
            token, told = await self._ask(read) if used else (read.token, False)
            end = ending(token, request.stop, left, self.model.context - self.length)
            self._tokens += 1
            self.metrics.add("tokens_total", by="side" if used else "base")
            if not told:
                await self.send(Token(token, end))
            self.unread = [token]
            if end != "more":
                return
            self.metrics.observe("token_seconds", time.perf_counter() - begin)
            begin = time.perf_counter()
            read = await self._read([token])

    def _wants(self, probability: float, begin: float) -> bool:
        """Whether the side network chooses the next token."""
        if self.pace is not None:
            cloud_ms = 1e3 * (time.perf_counter() - begin)
            return self.pace.allows(probability, self.terms.threshold, cloud_ms)
        return not self.gated or probability >= self.terms.threshold

    async def _read(self, tokens: list[int], seen: int = 0) -> Read:
        """Read tokens, in chunks; what the device may have to see of them waits, or is sent ahead when it is much."""
        for i in range(0, len(tokens), self.model.chunk):
            if self.connection.state is not State.OPEN:
                raise ConnectionClosedError(None, None)  # nobody waits for the rest
            chunk = tokens[i : i + self.model.chunk]
            read = await self.engine.read(self.slot, chunk)
            sigma = read.gate >= self.terms.threshold if self.gated else np.ones(len(chunk), bool)
            self.waiting.add(self.length, read.taps, sigma, seen)
            self.length += len(chunk)
            if self.waiting.nbytes > self.config.waiting_bytes:
                for positions, taps in self.waiting.collect(self._most, keep=1):
                    await self.send(Taps(positions, False, taps, None))
        self.unread = []
        return read

    @property
    def _most(self) -> int:
        """Bytes of activations that fit in a frame."""
        head = 4 * self.model.embed * (self.terms.head == "device")
        return min(self.config.frame_bytes, self.terms.frame_bytes) - 256 - head

    async def _ask(self, read: Read) -> tuple[int, bool]:
        """A round trip: the token, and whether the device knows it already."""
        begin, at_device = time.perf_counter(), self.terms.head == "device"
        last = self.length - 1
        if not self.waiting.positions or self.waiting.positions[-1] != last:
            # a budget held the gate back before, or the gate of a sparse memory is on the edge: it is needed now
            self.waiting.add(last, read.taps[:, -1:], [True], 0)
        parts = self.waiting.collect(self._most)
        for i, (positions, taps) in enumerate(parts):
            due = i == len(parts) - 1
            await self.send(Taps(positions, due, taps, read.hidden if due and at_device else None))
        answer: Step | SideState = await self.receive((Step if at_device else SideState,), self.config.reply_s)
        if answer.position != last:
            raise WireError(f"an answer for position {answer.position}: expected one for {last}.")
        if self.pace is not None and not self._carries_prompt:
            self.pace.exchanged(1e3 * (time.perf_counter() - begin))
        self._carries_prompt = False
        self._exchanges += 1
        self.metrics.observe("exchange_seconds", time.perf_counter() - begin)
        if isinstance(answer, Step):
            if answer.token >= self.model.vocab:
                raise WireError(f"step.token: expected an id below {self.model.vocab}, the size of the vocabulary.")
            return answer.token, True
        if answer.g.shape != (self.model.embed,):
            raise WireError(f"side_state.g: expected {self.model.embed} numbers, got {len(answer.g)}.")
        return await self.engine.finish(self.slot, answer.g), False
