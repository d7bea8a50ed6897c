"""The cloud's one model, shared by many sessions: what they ask at the same time is computed in one step.

Every session is a coroutine that asks for one thing at a time: :meth:`Engine.read` tokens, :meth:`Engine.finish` a
token with what the device answered. The engine takes all that waits, runs it as one batch in its own thread, and goes
round again: continuous batching over a fixed number of slots. Between two steps one chunk of one prompt is read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from spa_jax.errors import NetworkError
from spa_jax.metrics import Metrics
from spa_jax.wire import Hello

PATIENCE, LONGEST_WAIT = 0.25, 0.05
"""How long a step waits for more sessions: a share of its own time, and seconds at most."""


@dataclass(frozen=True)
class Read:
    """What base and gate make of T tokens that were read, for the one behind the last.

    Attributes:
        token: the base's own choice.
        gate: [T], the gate's probability behind each.
        taps: [n + 1, T, D], or [n + 1, T, d] projected: what the side network would have to see of them.
        hidden: f [D] of the last.
    """

    token: int
    gate: np.ndarray
    taps: np.ndarray
    hidden: np.ndarray


class CloudModel(Protocol):
    """Base, head and key-value cache with a fixed number of slots. Called from one thread.

    Attributes:
        fingerprint: of the base.
        vocab, embed, layers: of the base.
        slots: sessions at a time.
        context: tokens that one may hold.
        chunk: tokens of a prompt that are read at once.
    """

    fingerprint: str
    vocab: int
    embed: int
    layers: int
    slots: int
    context: int
    chunk: int

    def open(self, slot: int, terms: Hello) -> None:
        """A slot begins anew, with this device's gate and taps; raises PluginError for what cannot be."""

    def extend(self, slot: int, tokens: Sequence[int]) -> Read:
        """Read a chunk of a prompt."""

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Read]:
        """Read one token in each of these slots."""

    def finish(self, slots: Sequence[int], g: np.ndarray) -> list[int]:
        """The token behind the last that each slot read, with side states g [slots, D]."""


@dataclass
class _Job:
    slot: int
    payload: Any
    done: asyncio.Future


class Engine:
    """Runs a model for its sessions, from :meth:`run`.

    Attributes:
        writing: sessions in the middle of a text; they keep count.
    """

    def __init__(self, model: CloudModel, metrics: Metrics):
        self.model, self.metrics = model, metrics
        self.writing, self._step_s = 0, 0.0
        self._prompts: list[_Job] = []
        self._steps: list[_Job] = []
        self._answers: list[_Job] = []
        self._asked: set[asyncio.Future] = set()  # of all jobs that are not done, those in a batch too
        self._ended = False
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "spa-model")
        metrics.describe("steps_total", "counter", "Batched decoding steps.")
        metrics.describe("batch_fill_total", "counter", "Sessions in those steps, summed; over steps: batch fill.")
        metrics.describe("step_seconds", "histogram", "Time of a decoding step, with what was batched beside it.")

    async def open(self, slot: int, terms: Hello) -> None:
        """See :meth:`CloudModel.open`."""
        await self._call(self.model.open, slot, terms)

    async def read(self, slot: int, tokens: Sequence[int]) -> Read:
        """Read tokens in a slot: one is a step; more, at most ``model.chunk``, are a part of a prompt."""
        return await self._ask(self._prompts if len(tokens) > 1 else self._steps, slot, list(tokens))

    async def finish(self, slot: int, g: np.ndarray) -> int:
        """The token that the side state g [D] leads to."""
        return await self._ask(self._answers, slot, g)

    async def _ask(self, queue: list[_Job], slot: int, payload: Any) -> Any:
        if self._ended:
            raise _over()
        job = _Job(slot, payload, asyncio.get_running_loop().create_future())
        self._asked.add(job.done)
        job.done.add_done_callback(self._asked.discard)
        queue.append(job)
        self._wake.set()
        return await job.done

    async def run(self) -> None:
        """Serve until cancelled; then whoever still waits is told."""
        try:
            while True:
                if not (self._prompts or self._steps or self._answers):
                    self._wake.clear()
                    await self._wake.wait()
                await self._gather()
                await self._round()
        finally:
            self._ended = True
            for future in self._asked:
                _settle(future, _over())
            self._thread.shutdown(wait=False)

    async def _gather(self) -> None:
        """Wait a little for those who are about to ask: a step costs the same for one and for all."""
        await asyncio.sleep(0)  # whoever has just been answered may ask for the next
        until = time.perf_counter() + min(PATIENCE * self._step_s, LONGEST_WAIT)
        while len(self._prompts) + len(self._steps) + len(self._answers) < self.writing and time.perf_counter() < until:
            await asyncio.sleep(0.001)

    async def _round(self) -> None:
        if jobs := _take(self._answers):
            g = np.stack([job.payload for job in jobs])
            await self._batch(jobs, lambda: self.model.finish([job.slot for job in jobs], g))
        if jobs := _take(self._steps):
            begin = time.perf_counter()
            slots, tokens = [job.slot for job in jobs], [job.payload[0] for job in jobs]
            await self._batch(jobs, lambda: self.model.step(slots, tokens))
            self.metrics.add("steps_total")
            self.metrics.add("batch_fill_total", len(jobs))
            seconds = time.perf_counter() - begin
            self._step_s += 0.2 * (seconds - self._step_s)
            self.metrics.observe("step_seconds", seconds)
        while self._prompts and self._prompts[0].done.cancelled():
            self._prompts.pop(0)
        if self._prompts:
            job = self._prompts.pop(0)
            await self._batch([job], lambda: [self.model.extend(job.slot, job.payload)])

    async def _batch(self, jobs: list[_Job], call: Callable[[], list]) -> None:
        try:
            results = await self._call(call)
        except Exception as error:  # the sessions end with it, the engine goes on
            results = [error] * len(jobs)
        for job, result in zip(jobs, results, strict=True):
            _settle(job.done, result)

    async def _call(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _take(queue: list[_Job]) -> list[_Job]:
    """All that waits and is still wanted; the queue is empty afterwards."""
    jobs = [job for job in queue if not job.done.cancelled()]
    queue.clear()
    return jobs


def _over() -> NetworkError:
    return NetworkError("the server is closing: its model answers no more.", "closing")


def _settle(future: asyncio.Future, result: Any) -> None:
    """Answer who asks, if he is still there."""
    if future.done():
        return
    with suppress(asyncio.InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
