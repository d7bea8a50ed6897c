"""The cloud: a websocket server that holds base, gate, head and caches, and writes texts with the devices' help.

    async with Cloud(model, CloudConfig(), token="...") as cloud:
        await cloud.serve_forever()

One coroutine per connection (:class:`Session`), one engine for all. Every wait has an end, every frame is checked, and
what one client does wrong ends its own session only. Logs hold events, sizes and times; no text and no token ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import ssl
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from mlfs_jax.errors import ConfigError
from spa_jax.engine import CloudModel, Engine
from spa_jax.errors import NetworkError, WireError
from spa_jax.metrics import Metrics
from spa_jax.session import Refused, Session
from spa_jax.wire import FRAME_BYTES

LOG = logging.getLogger("spa_jax.cloud")
_QUIET = logging.getLogger("spa_jax.cloud.websockets")
_QUIET.setLevel(logging.CRITICAL)  # a refused handshake is our event, not the library's traceback
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class CloudConfig:
    """Where the server listens, and how long it waits for whom (seconds).

    Attributes:
        host, port: loopback unless told otherwise; port 0 takes a free one.
        frame_bytes: the largest frame that is accepted.
        hello_s: for the first frame of a connection.
        reply_s: for a device's answer.
        send_s: for a device to take a frame.
        queue_s: for a free slot; less than a device waits for its answer, so that it hears of a full server.
        idle_s: before an idle session loses its slot; it resumes by replay.
        linger_s: before an idle connection is closed.
        connections: at a time; None: four for each slot, and 16.
        waiting_bytes: activations of a session that wait until its device needs them; more are sent ahead.
        tls_cert, tls_key: PEM files; both or neither.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    frame_bytes: int = FRAME_BYTES
    hello_s: float = 5.0
    reply_s: float = 10.0
    send_s: float = 10.0
    queue_s: float = 5.0
    idle_s: float = 60.0
    linger_s: float = 600.0
    connections: int | None = None
    waiting_bytes: int = 16 * 2**20
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self):
        for name in ("hello_s", "reply_s", "send_s", "queue_s", "idle_s", "linger_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: expected seconds, more than 0.")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port = {self.port}: expected a number from 0 (any free one) to {2**16 - 1}.")
        if not 1024 <= self.frame_bytes < 2**31:
            raise ConfigError(f"frame_bytes = {self.frame_bytes}: expected from 1024 to {2**31 - 1}.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs a certificate and its key; give both tls_cert and tls_key, or neither.")


class Slots:
    """The engine's slots: free, in use, or kept for an idle session until another needs it."""

    def __init__(self, count: int):
        self.free = list(range(count))
        self.idle: dict[Session, bool] = {}
        self._waiting: deque = deque()

    async def acquire(self, timeout: float) -> int:
        """A slot: a free one, that of the session that has been idle for longest, or the next to become free.

        Raises:
            Refused: none became free in time.
        """
        if not self.free and self.idle:
            next(iter(self.idle)).evict()
        if self.free:
            return self.free.pop()
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.done() and not future.cancelled():
                self.release(future.result())  # it came in the very turn of the loop in which the time was up
            if isinstance(error, TimeoutError):
                raise Refused("busy", "all sessions of this server are in use; try again.") from None
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for one."""
        return any(not future.done() for future in self._waiting)

    def release(self, slot: int) -> None:
        """Hand a slot to whoever waits for one, or keep it free."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self.free.append(slot)


class Cloud:
    """A server over a model; an asynchronous context manager.

    Attributes:
        metrics: what it counts; also at the path /metrics, for those who have the token.
        url: where devices connect to, once it is entered.
    """

    def __init__(self, model: CloudModel, config: CloudConfig | None = None, *, token: str | None = None):
        """
        Args:
            token: what devices have to know; None only on a loopback address.

        Raises:
            ConfigError: no token on an address that others can reach; a certificate that cannot be read.
        """
        self.model, self.config = model, config or CloudConfig()
        if token is None and self.config.host not in LOOPBACK:
            raise ConfigError(
                f"host = {self.config.host!r} can be reached from other machines: give a token that devices have to "
                "know (--token-file), or listen on 127.0.0.1."
            )
        if token is not None and len(token) < 16:
            raise ConfigError(
                f"the token has {len(token)} characters: expected at least 16, e.g. of `openssl rand -hex 32`."
            )
        self._token = None if token is None else hashlib.sha256(token.encode()).digest()
        self._ssl = server_tls(self.config)
        self.metrics = Metrics()
        describe_metrics(self.metrics)
        self.engine = Engine(model, self.metrics)
        self.slots = Slots(model.slots)
        self._sessions: set[Session] = set()
        self._running: asyncio.Task | None = None

    async def __aenter__(self) -> Cloud:
        if self._running is not None:
            raise ConfigError("this Cloud has served before: make a new one; its model may be the same.")
        config = self.config
        self._server = await serve(
            self._handle,
            config.host,
            config.port,
            process_request=self._admit,
            ssl=self._ssl,
            max_size=config.frame_bytes,
            max_queue=4,
            compression=None,
            open_timeout=config.hello_s,
            close_timeout=1,
            logger=_QUIET,
        )
        self._running = asyncio.create_task(self.engine.run())
        host = f"[{config.host}]" if ":" in config.host else config.host
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'wss' if self._ssl else 'ws'}://{host}:{port}"
        log(
            "listening", url=self.url, slots=self.model.slots, context=self.model.context, token=self._token is not None
        )
        return self

    async def __aexit__(self, *_) -> None:
        last = "the server is shutting down; connect again when it is back."
        await asyncio.gather(*(session.say_error("closing", last) for session in self._sessions))
        self._server.close()
        await self._server.wait_closed()
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running
        log("closed")

    async def serve_forever(self) -> None:
        """Until cancelled; or until the engine dies, with its error."""
        await asyncio.shield(self._running)  # sessions need it to the end: __aexit__ stops it behind them

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a handshake: None lets it through."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "ok\n")
        if not self._knows_token(request):
            self.metrics.add("errors_total", code="auth")
            log("refused", code="auth")
            text = "auth: no token, or a wrong one; send the server's (--token-file), as `Authorization: Bearer ...`.\n"
            return connection.respond(HTTPStatus.UNAUTHORIZED, text)
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if request.path not in ("", "/"):
            return connection.respond(HTTPStatus.NOT_FOUND, "there is / for devices, /metrics and /healthz.\n")
        most = self.config.connections or 4 * self.model.slots + 16
        if len(self._sessions) >= most:
            self.metrics.add("errors_total", code="busy")
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, f"busy: {most} connections are open; try again.\n"
            )
        return None

    def _knows_token(self, request: Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get_all("Authorization")
        if len(given) != 1 or not given[0].startswith("Bearer "):
            return False
        digest = hashlib.sha256(given[0].removeprefix("Bearer ").strip().encode()).digest()
        return hmac.compare_digest(digest, self._token)  # of digests: not even the length takes time to compare

    async def _handle(self, connection: ServerConnection) -> None:
        session = Session(connection, self.engine, self.slots, self.config, secrets.token_hex(4))
        self._sessions.add(session)
        self.metrics.set("connections", len(self._sessions))
        code, reason = "ok", None
        try:
            await session.run()
        except (WireError, Refused, NetworkError) as error:
            code, reason = error.code, str(error)
        except ConnectionClosed as error:
            said = None if error.sent is None else (error.sent.code, error.sent.reason)
            code = "closing" if said == (1008, "closing") else "too-large" if said and said[0] == 1009 else "lost"
        except TimeoutError:
            code, reason = "timeout", f"nothing was heard or taken for too long while {session.doing}."
        except Exception as error:
            code, reason = "internal", "the server failed at this; its log says where."
            at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            log("failed", session=session.name, error=type(error).__name__, doing=session.doing, at=at[-4:])
            LOG.debug("traceback", exc_info=True)
        finally:
            session.release()
            self._sessions.discard(session)
            self.metrics.set("connections", len(self._sessions))
            if code != "ok":
                self.metrics.add("errors_total", code=code)
            log("ended", session=session.name, code=code, doing=session.doing, **session.counts())
        if reason is not None:
            await session.say_error(code, reason)


def server_tls(config: CloudConfig) -> ssl.SSLContext | None:
    """The context of a server with a certificate; raises ConfigError for one that cannot be read."""
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the certificate {config.tls_cert} or its key cannot be used: {error}.") from error
    return context


def describe_metrics(metrics: Metrics) -> None:
    """What sessions count, beside the engine."""
    for name, kind, text in (
        ("connections", "gauge", "Open connections."),
        ("sessions", "gauge", "Sessions that hold a slot."),
        ("evictions_total", "counter", "Idle sessions that lost their slot."),
        ("tokens_total", "counter", "New tokens, by who chose them."),
        ("prompt_tokens_total", "counter", "Tokens of prompts and replays."),
        ("bytes_total", "counter", "Bytes of frames, by direction."),
        ("errors_total", "counter", "Sessions and handshakes that ended badly, by code."),
        ("token_seconds", "histogram", "Time from one new token of a session to the next."),
        ("exchange_seconds", "histogram", "Time of a round trip to a device, its computation included."),
    ):
        metrics.describe(name, kind, text)


def log(event: str, **fields) -> None:
    """One line of JSON. Never give it text or token ids of a user."""
    LOG.info(json.dumps({"event": event, **fields}))
