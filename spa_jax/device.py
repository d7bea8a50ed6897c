"""The device: it asks the cloud for texts and answers with its side network whenever the gate wants it.

    async with Device("wss://host:8765", model, token=...) as device:
        answer = await device.generate(prompt_tokens, limit=50, stop=[2])

Links break and servers go: the device then connects again and resumes by sending the tokens so far, and the text comes
out as if nothing had happened. When that fails, too, it goes on with what it has (``fallback``), or gives what was
written so far. Nothing here, nor in what it imports, is the cloud's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlfs_jax.errors import ConfigError
from spa_jax.channel import Channel, DeviceConfig, Lost, Stats
from spa_jax.errors import NetworkError, WireError
from spa_jax.wire import Hello, Prefill, Resume, SideState, Step, Taps, Token, encode, ending


class DeviceModel(Protocol):
    """A side network. Its state is a value: the one from before stays good."""

    def terms(self) -> Hello:
        """How it wants to work."""

    def start(self) -> Any:
        """The state of a text of which it has seen nothing."""

    def side(self, state: Any, taps: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, Any]:
        """g [D] at the last of T positions, from taps [n + 1, T, D or d]; and the state with them in it."""

    def choose(self, hidden: np.ndarray, g: np.ndarray) -> int:
        """The token from f [D] and g [D], when the head is on the device."""


@dataclass
class Answer:
    """A text, or what there is of it.

    Attributes:
        tokens: new ones, without the stop token.
        used: for each new token, stop token included: whether the side network was used.
        end: "stop", "limit" or "full" (the session holds no more); "timeout" or "lost" when the cloud did not go on.
        local: how many of the tokens, the last ones, the device wrote without the cloud.
        note: what went wrong, for people; "" when nothing did.
    """

    tokens: list[int] = field(default_factory=list)
    used: list[bool] = field(default_factory=list)
    end: str = ""
    local: int = 0
    note: str = ""
    stats: Stats = field(default_factory=Stats)


class Device:
    """A conversation with a cloud; an asynchronous context manager.

    Attributes:
        history: every token so far, prompts and answers, stop tokens included.
    """

    def __init__(
        self,
        url: str,
        model: DeviceModel,
        *,
        token: str | None = None,
        config: DeviceConfig | None = None,
        fallback: Callable[[list[int], int, Sequence[int]], Iterable[int]] | None = None,
    ):
        """
        Args:
            url: ws:// or wss://.
            token: that the server asks for.
            fallback: called with all tokens, how many more are wanted and the stop tokens when the cloud is gone;
                gives the next tokens.

        Raises:
            ConfigError: a token that would travel unencrypted to another machine; not a websocket URL.
        """
        self.url, self.model, self.config, self.fallback = url, model, config or DeviceConfig(), fallback
        self.terms = model.terms()
        self.history: list[int] = []
        self._channel = Channel(url, token, self.terms, self.config)
        self._busy = False  # a text is being written
        self._closed = False  # since it was begun
        self._live = False  # the session has the whole history, but for what is being sent
        self._state, self._seen = model.start(), 0
        self._undo: tuple[Any, int] | None = None  # before the frame that no token has answered yet

    async def __aenter__(self) -> Device:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def close(self) -> None:
        """Say goodbye. What was said is kept; the next text resumes it."""
        self._live, self._closed = False, True
        await self._channel.close()

    async def generate(
        self,
        tokens: Sequence[int],
        limit: int,
        stop: Sequence[int] = (),
        on_token: Callable[[int, bool], None] | None = None,
    ) -> Answer:
        """Say ``tokens`` after all that was said before, and take the continuation.

        Args:
            limit: how many new tokens at most.
            stop: token ids that end it.
            on_token: called with each new token, and whether the side network was used, as they come.

        Raises:
            ConfigError: nothing to say, a limit or stop tokens that cannot be; or another text is being written.
            NetworkError: the server refuses, or cannot be reached and nothing was written yet.
        """
        if self._busy:
            raise ConfigError("this device is writing a text: wait for its end, or make another Device for this one.")
        answer, begin = Answer(), time.perf_counter()
        ends = np.asarray(stop) if len(stop) else np.zeros(0, np.int32)
        text = _Text(list(tokens), limit, ends, on_token, answer)
        if not text.prompt:
            raise ConfigError("tokens is empty: expected at least one, such as the beginning-of-text token.")
        try:
            encode(Prefill(np.asarray(text.prompt), limit, text.stop))
        except WireError as error:
            raise ConfigError(f"this text cannot be asked for: {error}") from None
        answer.stats.rtt = self._channel.stats.rtt  # of the connection, if it still is there
        self._channel.stats, self._busy, self._closed = answer.stats, True, False
        self.history += text.prompt
        if self._channel.is_stale:
            self._leave()
        try:
            async with asyncio.timeout(self.config.answer_s) as clock:
                await self._persist(text)
        except TimeoutError:
            if not clock.expired():  # it is of on_token
                self._forget(text)
                raise
            self._leave()
            answer.end, answer.note = "timeout", f"the text was not complete after {self.config.answer_s:g} s."
        except Lost as error:
            answer.end, answer.note = ("timeout" if error.code == "timeout" else "lost"), str(error)
            if not answer.used and (self.fallback is None or self._closed):
                self._forget(text)
                hint = "" if self._closed else f" Is the server at {self.url} running?"
                raise NetworkError(f"{error}{hint}", error.code) from None
        except NetworkError as error:
            if not answer.used:
                self._forget(text)
                raise
            self._leave()
            answer.end, answer.note = "lost", str(error)
        except WireError as error:
            await self._channel.refuse(error)
            self._forget(text)
            raise NetworkError(f"cloud and device do not understand each other: {error}", error.code) from None
        except BaseException:
            self._forget(text)
            raise
        finally:
            self._busy = False
        if answer.end in ("timeout", "lost") and self.fallback is not None and not self._closed:
            self._continue_alone(text)
        answer.stats.total = time.perf_counter() - begin
        return answer

    def _leave(self, *, keep: bool = False) -> None:
        """The session in the cloud is gone, and with it what the side network answered without a token to show."""
        if not keep:
            self._channel.drop()
        self._live = False
        if self._undo is not None:
            (self._state, self._seen), self._undo = self._undo, None

    def _forget(self, text: _Text) -> None:
        """What could not be said was not said; the side network begins anew."""
        self._leave()
        del self.history[len(self.history) - len(text.answer.used) - len(text.prompt) :]
        self._state, self._seen = self.model.start(), 0

    async def _persist(self, text: _Text) -> None:
        """Write the text over as many connections as it takes."""
        failures = 0
        while True:
            before = len(text.answer.used)
            try:
                await self._write(text)
                return
            except Lost as error:
                failures = 1 if len(text.answer.used) > before else failures + 1
                self._leave(keep=error.code == "evicted")
                if failures > self.config.retries or self._closed:
                    raise
                await asyncio.sleep(self.config.backoff_s * 2 ** (failures - 1))

    def _continue_alone(self, text: _Text) -> None:
        answer = text.answer
        for token in self._own(text):
            if token is None:
                return
            end = self._take(text, int(token), False)
            answer.local += end != "stop"
            if end != "more":
                answer.end = end
                break
        else:
            answer.end = "full"
        answer.note += " The device went on with its own model."

    def _own(self, text: _Text) -> Iterator[int | None]:
        """The tokens of the device's own model, and None when it fails: what there is of the text is kept."""
        try:
            yield from self.fallback(list(self.history), text.limit - len(text.answer.used), text.stop.tolist())
        except Exception as error:
            text.answer.note += f" The device's own model failed: {type(error).__name__}: {error}"
            yield None

    # ------------------------------------------------------------------------------------------------- one link
    async def _write(self, text: _Text) -> None:
        channel = self._channel
        if not channel.is_open:
            await channel.open()
        left = text.limit - len(text.answer.used)
        if self._live:
            await channel.send(Prefill(np.asarray(text.prompt, np.int32), left, text.stop))
        else:
            await channel.send(Resume(np.asarray(self.history, np.int32), self._seen, left, text.stop))
        self._live, used = False, False  # until the text is whole
        patience = self.config.answer_s  # reading a prompt takes what it takes; pings find a link that is dead
        while True:
            message: Taps | Token = await channel.receive((Taps, Token), patience)
            if isinstance(message, Token) or message.due:
                patience = self.config.reply_s
            if isinstance(message, Token):
                self._check(message.token < channel.welcome.vocab, "token.token is not in the vocabulary")
                token, told = message.token, message.end
            else:
                token, told, used = await self._answer(message), None, message.due
                if token is None:
                    continue
            self._undo = None
            end = self._take(text, token, used, told=told, room=channel.welcome.context - len(self.history))
            used = False
            if end != "more":
                text.answer.end, self._live = end, True
                return

    def _take(self, text: _Text, token: int, used: bool, *, told: str | None = None, room: int = 1) -> str:
        """A new token; what comes after it, as the cloud says or as both sides know."""
        end = ending(token, text.stop, text.limit - len(text.answer.used), room)
        self._check(told in (None, end), f"token.end is {told!r} where limit, stop and context make it {end!r}")
        self.history.append(token)
        text.answer.used.append(used)
        if end != "stop":
            text.answer.tokens.append(token)
        if text.on_token is not None:
            text.on_token(token, used)
        return end

    async def _answer(self, taps: Taps) -> int | None:
        """Run the side network on a frame; the token, if the head is here."""
        stats, welcome = self._channel.stats, self._channel.welcome
        first, last, here = int(taps.positions[0]), int(taps.positions[-1]), self.terms.head == "device"
        end, wanted = len(self.history) - 1, taps.due and here
        self._check(self._seen <= first and (last == end if taps.due else last < end), "taps.positions are not next")
        self._check(len(taps.taps) == len(self.terms.taps) + 1, "taps.taps is not of the layers that hello named")
        shape = (welcome.embed,) if wanted else None
        self._check(getattr(taps.hidden, "shape", None) == shape, "taps.hidden is not what hello asked for")
        before = self._state, self._seen
        begin = time.perf_counter()
        try:
            g, self._state = self.model.side(self._state, taps.taps, taps.positions)
            token = self.model.choose(taps.hidden, g) if wanted else None
        finally:
            stats.device += time.perf_counter() - begin
        self._seen = last + 1
        stats.positions += len(taps.positions)
        if not taps.due:
            return None
        self._undo = before
        stats.round_trips += 1
        await self._channel.send(Step(last, token) if here else SideState(last, g))
        return token

    @staticmethod
    def _check(fits: bool, what: str) -> None:
        if not fits:
            raise WireError(f"{what}.")


@dataclass
class _Text:
    prompt: list[int]
    limit: int
    stop: np.ndarray
    on_token: Callable[[int, bool], None] | None
    answer: Answer
