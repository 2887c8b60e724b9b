"""A WebSocket client of chatd.v1 for the commands: one connection, which sends requests and receives events."""

from __future__ import annotations

import json
import math
import ssl
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from chatd.core.errors import innermost
from chatd.core.limits import HISTORY_PAGE_MAX
from chatd.core.protocol import SUBPROTOCOL

PATIENCE = 10.0  # seconds for connecting, for the handshake, and for a reply
CLOSE_SECONDS = 1.0  # seconds that the server has to answer a close frame
FRAME_BYTES = 16 * 1024 * 1024  # the limit of one event; a large `ready` has half a MiB

Event = dict[str, Any]
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Disconnected(Exception):
    """The connection could not be made, or has ended. `code` is the close code; 0 without a close frame."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def final(self) -> bool:
        """Whether the client must not reconnect (docs/protocol.md)."""
        return 4500 <= self.code <= 4999


class NotUpgraded(Disconnected):
    """The server has answered the handshake with another status than 101. The names in `headers` are in lower
    case.
    """

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status} instead of a WebSocket")
        self.status, self.headers, self.body = status, headers, body


class Connection:
    """An open connection. `next` returns events in order, also those that arrive while `request` waits."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self._ws = ws
        self._passed_over: deque[Event] = deque()  # events that arrived while `request` waited for its reply
        self._ref = 0
        self._silence = math.inf  # seconds without an event after which the server is gone; from `hello`

    async def send(self, event: str, **fields: Any) -> None:
        """Send an event. Raises Disconnected."""
        try:
            await self._ws.send_message(json.dumps({"event": event} | fields))
        except ConnectionClosed as end:
            raise _disconnected(end) from None

    async def next(self) -> Event:
        """Wait for the next event and return it. Pings are answered and not returned. Raises Disconnected."""
        return self._passed_over.popleft() if self._passed_over else await self._receive()

    async def request(self, event: str, **fields: Any) -> Event:
        """Send a request and return its reply, which may be an `error`. Raises Disconnected, also if no reply
        arrives in time.
        """
        self._ref += 1
        with trio.move_on_after(PATIENCE):
            await self.send(event, ref=self._ref, **fields)
            while True:
                found = await self._receive()
                if found.get("ref") == self._ref:
                    return found
                self._passed_over.append(found)
        raise Disconnected(f"no answer to {event!r} in {PATIENCE:.0f} s")

    async def _receive(self) -> Event:
        while True:
            try:
                with trio.fail_after(self._silence):
                    found = json.loads(await self._ws.get_message())
            except trio.TooSlowError:
                raise Disconnected("no sign of life from the server") from None
            except ConnectionClosed as end:
                raise _disconnected(end) from None
            except ValueError:
                raise Disconnected("the server sends frames that are not JSON, so it is not chatd") from None
            if not isinstance(found, dict) or "event" not in found:
                raise Disconnected("the server sends frames that are not events, so it is not chatd")
            if found["event"] == "hello":
                self._silence = found["ping_interval"] + found["ping_timeout"] + PATIENCE
            if found["event"] != "ping":
                return found
            await self.send("pong")


@asynccontextmanager
async def connect(
    url: str, *, origin: str = "", headers: dict[str, str] | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    """Open a connection for the duration of a block. Its first event is `hello`. `context`: TLS settings for
    wss://, if not the system's.

    Raises Disconnected, or NotUpgraded.
    """
    sent = (headers or {}) | ({"Origin": origin} if origin else {})
    stream = await _open(url, context)
    failed: Exception | None = None
    # This function closes the stream, because the library does not if the server has sent its close frame
    # first.
    try:
        async with trio.open_nursery() as nursery:
            try:
                ws = await _shake_hands(nursery, stream, url, sent)
                try:
                    yield Connection(ws)
                finally:
                    with trio.move_on_after(CLOSE_SECONDS, shield=True):
                        await ws.aclose()
            except Exception as error:
                failed = error  # raised after the nursery, so that it is not wrapped in a group
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:  # the library's reader got another answer than 101, or an invalid one
        raise _not_opened(group) from None
    finally:
        await trio.aclose_forcefully(stream)
    if failed is not None:
        raise failed


async def _open(url: str, context: ssl.SSLContext | None) -> Stream:
    try:
        parts = urlsplit(url)
        secure = parts.scheme in ("wss", "https")
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    except ValueError:
        raise Disconnected(f"{url}: this is not a valid URL") from None
    with trio.move_on_after(PATIENCE):
        try:
            plain = await trio.open_tcp_stream(host, port)
            return await _secured(plain, host, context) if secure else plain
        except (OSError, trio.BrokenResourceError) as error:
            raise Disconnected(f"cannot connect to {host}:{port}: {_why(error)}") from None
    raise Disconnected(f"no connection to {host}:{port} in {PATIENCE:.0f} s")


async def _secured(
    plain: trio.SocketStream, host: str, context: ssl.SSLContext | None
) -> trio.SSLStream[trio.SocketStream]:
    context = context or ssl.create_default_context()
    stream = trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(plain)
        raise
    return stream


async def _shake_hands(
    nursery: trio.Nursery, stream: Stream, url: str, headers: dict[str, str]
) -> WebSocketConnection:
    parts = urlsplit(url)
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    extra = [(name.encode(), value.encode()) for name, value in headers.items()]
    with trio.move_on_after(PATIENCE):
        try:
            return await wrap_client_stream(
                nursery,
                stream,
                parts.netloc.rpartition("@")[2],
                resource,
                subprotocols=[SUBPROTOCOL],
                extra_headers=extra,
                max_message_size=FRAME_BYTES,
            )
        except (HandshakeError, ConnectionClosed, trio.BrokenResourceError, OSError) as error:
            raise Disconnected(f"the handshake failed: {_why(error)}") from None
    raise Disconnected(f"no answer to the handshake in {PATIENCE:.0f} s")


async def history(connection: Connection, conversation_id: int, count: int) -> list[Event]:
    """Return the newest `count` messages of a room, oldest first. Raises Disconnected."""
    found: list[Event] = []
    more = True
    while more and len(found) < count:
        before = {"before": found[0]["id"]} if found else {}
        limit = min(HISTORY_PAGE_MAX, count - len(found))
        page = await connection.request("history", conversation_id=conversation_id, limit=limit, **before)
        found = page.get("messages", []) + found
        more = page.get("has_more", False)
    return found


def _disconnected(end: ConnectionClosed) -> Disconnected:
    if end.reason is None:
        return Disconnected("the connection was cut")
    return Disconnected(end.reason.reason or end.reason.name or "the connection was closed", end.reason.code)


def _not_opened(error: BaseException) -> Disconnected:
    error = _cause_of(error)
    if isinstance(error, ConnectionRejected):
        given = {name.decode().lower(): value.decode("latin-1") for name, value in error.headers or ()}
        return NotUpgraded(error.status_code, given, error.body or b"")
    return Disconnected(f"the answer is not a WebSocket handshake: {_why(error)}")


def _cause_of(error: BaseException) -> BaseException:
    error = innermost(error)
    while isinstance(error, OSError | trio.BrokenResourceError) and error.__cause__ is not None:
        error = innermost(error.__cause__)
    return error


def _why(error: BaseException) -> str:
    """Return the error's text, in one line."""
    error = _cause_of(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
