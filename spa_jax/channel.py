"""The device's end of a connection: how it is made, what may cross it, and what its breaking means."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from mlfs_jax.errors import ConfigError
from spa_jax.errors import NetworkError, WireError
from spa_jax.wire import FROM_CLOUD, Bye, Error, Hello, M, Message, Welcome, decode, encode

HOPELESS = ("auth", "protocol", "bad-frame", "too-large", "model", "plugin", "too-long", "tls")
"""Errors that trying again does not mend."""


@dataclass(frozen=True)
class DeviceConfig:
    """How patient a device is (seconds).

    Attributes:
        connect_s: for a connection and its greeting.
        reply_s: for the cloud's next frame, once it has read the prompt; then the link counts as lost.
        answer_s: for a whole text; then it ends with what there is.
        retries: connections that are tried after the last progress, the first ``backoff_s`` after it, each next one
            twice as late.
        cafile: PEM of the authority that signed the server's certificate, when it is not a public one.
    """

    connect_s: float = 5.0
    reply_s: float = 10.0
    answer_s: float = 300.0
    retries: int = 4
    backoff_s: float = 0.1
    cafile: Path | None = None

    def __post_init__(self):
        for name in ("connect_s", "reply_s", "answer_s", "backoff_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected seconds, more than 0.")
        if self.retries < 0:
            raise ConfigError(f"retries = {self.retries}: expected a whole number of at least 0.")


@dataclass
class Stats:
    """What one text cost. Times in seconds; bytes are of frames.

    Attributes:
        connections: that it took to be made.
        positions: of the text that the side network read.
        waiting: for the cloud and the link.
        device: in the side network.
        rtt: from hello to welcome.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    round_trips: int = 0
    positions: int = 0
    connections: int = 0
    total: float = 0.0
    waiting: float = 0.0
    device: float = 0.0
    rtt: float = 0.0


class Lost(Exception):
    """The link, or the session behind it; ``code`` as in NetworkError."""

    def __init__(self, message: str, code: str = "lost"):
        super().__init__(message)
        self.code = code


class Channel:
    """A connection to a cloud, when there is one.

    Attributes:
        welcome: what the cloud said last about itself; None before the first connection.
        stats: where costs are counted.
    """

    def __init__(self, url: str, token: str | None, terms: Hello, config: DeviceConfig):
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname or "", parts.port
            host.encode("idna")
        except ValueError as error:  # of which a UnicodeError is one
            raise ConfigError(f"server = {url!r}: expected ws://host:port or wss://host:port; {error}.") from None
        if parts.scheme not in ("ws", "wss") or not host:
            raise ConfigError(f"server = {url!r}: expected ws://host:port or wss://host:port.")
        if parts.scheme == "ws" and token is not None and host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(f"server = {url!r}: a token would travel in the clear; use wss://.")
        self.url, self.terms, self.config = url, terms, config
        self.stats = Stats()
        self.welcome: Welcome | None = None
        self._token = token
        self._connection: ClientConnection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @property
    def is_stale(self) -> bool:
        """Whether the connection is of another event loop than the one that runs, and so of no use."""
        return self._connection is not None and self._connection.loop is not asyncio.get_running_loop()

    def _here(self) -> ClientConnection:
        if self._connection is None:
            raise Lost("it was closed while a text was written.", "closed")
        return self._connection

    async def close(self) -> None:
        """Say goodbye."""
        if self.is_stale:
            self.drop()
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(ConnectionClosed, TimeoutError, OSError):
                async with asyncio.timeout(1):
                    await connection.send(encode(Bye()))
            with suppress(TimeoutError, OSError):
                async with asyncio.timeout(1):
                    await connection.close()

    def drop(self) -> None:
        """Leave without a word."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(RuntimeError):  # of an event loop that is closed
                connection.transport.abort()

    async def open(self) -> None:
        """Connect and greet; raises NetworkError when it is no use, Lost when it may be."""
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        try:
            self._connection = await connect(
                self.url,
                additional_headers=headers,
                ssl=_tls(self.config) if self.url.startswith("wss") else None,
                max_size=self.terms.frame_bytes,
                open_timeout=self.config.connect_s,
                close_timeout=1,
                compression=None,
                proxy=None,
            )
        except InvalidStatus as error:
            said = (error.response.body or b"").decode(errors="replace").strip()[:300]
            if error.response.status_code == 401:
                raise NetworkError(f"the server refuses this device: {said}", "auth") from None
            if error.response.status_code < 500:
                raise NetworkError(f"no SPA server at {self.url}: it answers {error}. {said}", "protocol") from None
            raise Lost(f"the server answers {error.response.status_code}: {said}.", "busy") from None
        except ssl.SSLCertVerificationError as error:
            raise NetworkError(
                f"the server's certificate is not good: {error.verify_message}. If it is your own authority's, give "
                "its certificate (--cafile).",
                "tls",
            ) from None
        except InvalidURI as error:
            raise NetworkError(f"{error}; expected ws://host:port or wss://host:port.", "protocol") from None
        except TimeoutError:
            raise Lost(f"no connection to {self.url} within {self.config.connect_s:g} s.", "timeout") from None
        except (OSError, InvalidHandshake, EOFError) as error:
            said = str(error) or type(error).__name__
            hint = "" if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else WRONG_SCHEME
            raise Lost(f"no connection to {self.url}: {said}.{hint}") from None
        self.stats.connections += 1
        begin = time.perf_counter()
        await self.send(self.terms)
        self.welcome = await self.receive((Welcome,), self.config.connect_s)
        self.stats.rtt = time.perf_counter() - begin
        if self.welcome.model != self.terms.model:
            raise NetworkError("the server welcomes with another base than the plugin's.", "model")

    async def send(self, message: Message) -> None:
        data = encode(message, self.terms.coding)
        limit = self.welcome.frame_bytes if self.welcome is not None else len(data)
        if len(data) > limit:
            raise NetworkError(f"a frame of {len(data)} bytes is needed, the server accepts {limit}.", "too-large")
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(self.config.reply_s):
                await self._here().send(data)
        except ConnectionClosed as error:
            raise await self._broken(error) from None
        except TimeoutError:
            raise Lost(f"the server took nothing for {self.config.reply_s:g} s.", "timeout") from None
        finally:
            self.stats.waiting += time.perf_counter() - begin
        self.stats.bytes_up += len(data)

    async def receive(self, allowed: tuple[type[M], ...], timeout: float | None = None) -> M:
        timeout, begin = timeout or self.config.reply_s, time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                data = await self._here().recv()
        except ConnectionClosed as error:
            raise await self._broken(error) from None
        except TimeoutError:
            raise Lost(f"the server was silent for {timeout:g} s.", "timeout") from None
        finally:
            self.stats.waiting += time.perf_counter() - begin
        self.stats.bytes_down += len(data)
        return self._understand(data, allowed)

    async def refuse(self, error: WireError) -> None:
        """Tell the server what is wrong with what it sent, and hang up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(ConnectionClosed, TimeoutError, OSError):
                async with asyncio.timeout(1):
                    await connection.send(encode(Error(error.code, str(error)[:1000])))
                    await connection.close(1008, error.code)

    def _understand(self, data: str | bytes, allowed: tuple[type[M], ...]) -> M:
        """The message. Raises NetworkError or Lost for one that is an error, WireError for one that cannot be."""
        message = decode(data, FROM_CLOUD, frame_bytes=self.terms.frame_bytes)
        if isinstance(message, Error):
            if message.code in HOPELESS:
                raise NetworkError(f"the server refuses ({message.code}): {message.message}", message.code)
            raise Lost(f"the server says ({message.code}): {message.message}", message.code)
        return message if isinstance(message, allowed) else decode(data, allowed)  # which says what was expected

    async def _broken(self, error: ConnectionClosed) -> Exception:
        """What a broken connection means; the server's last words, if there are any, say it best."""
        for _ in range(4):
            try:
                async with asyncio.timeout(0.1):
                    data = await self._here().recv()
                message = decode(data, FROM_CLOUD, frame_bytes=self.terms.frame_bytes)
            except (ConnectionClosed, TimeoutError, WireError):
                break
            except Lost as closed:
                return closed
            if isinstance(message, Error):
                try:
                    self._understand(data, ())
                except (NetworkError, Lost) as said:
                    return said
        codes = {close.code for close in (error.rcvd, error.sent) if close is not None}
        if 1009 in codes:
            return NetworkError("a frame was larger than the other side accepts.", "too-large")
        return Lost(f"the connection broke: {error}.")


WRONG_SCHEME = " Perhaps it speaks the other one of ws:// and wss://."


def _tls(config: DeviceConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=config.cafile)
    except OSError as error:
        raise ConfigError(f"the certificate {config.cafile} cannot be read: {error}.") from error
