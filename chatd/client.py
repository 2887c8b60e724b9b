"""A client of chatd.v1: connect, log in, ask, and follow rooms over restarts of the daemon.

    connect    one connection; `next` and `request` are all there is to it
    Follower   keeps to the rules of docs/protocol.md §5 and §6: a cursor for each room, resuming, when to stop

For the commands. Beside hub/connection.py, the server's end, this is the only import of trio_websocket.
"""

from __future__ import annotations

import json
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
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

from chatd.limits import HISTORY_PAGE_MAX
from chatd.protocol import SUBPROTOCOL

PATIENCE = 10.0  # seconds for a connection, a handshake, a reply
GOODBYE = 1.0  # seconds for a close
FRAME_BYTES = 16 * 1024 * 1024  # of one event; a `ready` has half a MiB
RETRY_FIRST, RETRY_MOST = 0.5, 20.0  # seconds; a random moment before that, doubled each time
LIVED = 10.0  # seconds past `ready` after which the next trouble is a new one
CHANGES = ("message", "message.updated", "message.deleted")

Event = dict[str, Any]
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Disconnected(Exception):
    """There is no connection, or no longer. `code` is the one of a close, 0 where there was none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def final(self) -> bool:
        """Whether trying again is of no use."""
        return 4500 <= self.code <= 4999


class NotUpgraded(Disconnected):
    """The handshake was answered, but with no WebSocket. `headers` have lower-case names."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status} instead of a WebSocket")
        self.status, self.headers, self.body = status, headers, body


class Refused(Exception):
    """The server says no, and would again. `code` is one of errors.py, or of a close."""

    def __init__(self, code: str | int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Connection:
    """An open connection. Events come in order; what `request` passes over, `next` has later."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self._ws = ws
        self._passed_over: deque[Event] = deque()
        self._ref = 0

    async def send(self, event: str, **fields: Any) -> None:
        """Raises Disconnected."""
        try:
            await self._ws.send_message(json.dumps({"event": event} | fields))
        except ConnectionClosed as end:
            raise _disconnected(end) from None

    async def next(self) -> Event:
        """The next event but pings, which are answered. Waits as long as it takes. Raises Disconnected."""
        return self._passed_over.popleft() if self._passed_over else await self._receive()

    async def request(self, event: str, **fields: Any) -> Event:
        """The reply, which may be an `error`. Raises Disconnected, also when none comes in time."""
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
                found = json.loads(await self._ws.get_message())
            except ConnectionClosed as end:
                raise _disconnected(end) from None
            except ValueError:
                raise Disconnected("what comes is no JSON, so this is no chatd") from None
            if not isinstance(found, dict) or "event" not in found:
                raise Disconnected("what comes is no event, so this is no chatd")
            if found["event"] != "ping":
                return found
            await self.send("pong")


@asynccontextmanager
async def connect(
    url: str, *, origin: str = "", headers: dict[str, str] | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[Connection]:
    """A connection of which `hello` has not been read yet. `context` is for wss://, if not the system's.

    Raises Disconnected, or NotUpgraded.
    """
    sent = (headers or {}) | ({"Origin": origin} if origin else {})
    stream = await _open(url, context)
    failed: Exception | None = None
    # The stream is ours, for the library leaves it open when the server has said goodbye first.
    try:
        async with trio.open_nursery() as nursery:
            try:
                ws = await _shake_hands(nursery, stream, url, sent)
                try:
                    yield Connection(ws)
                finally:
                    with trio.move_on_after(GOODBYE, shield=True):
                        await ws.aclose()
            except Exception as error:
                failed = error  # leaves the nursery as it is, in no group
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:  # the library's reader, which does not expect every server
        raise Disconnected(f"what comes is no WebSocket: {_why(group)}") from None
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
        raise Disconnected(f"{url}: this is no URL") from None
    with trio.move_on_after(PATIENCE):
        try:
            plain = await trio.open_tcp_stream(host, port)
            if not secure:
                return plain
            context = context or ssl.create_default_context()
            stream = trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)
            await stream.do_handshake()
            return stream
        except (OSError, trio.BrokenResourceError) as error:
            raise Disconnected(f"cannot connect to {host}:{port}: {_why(error)}") from None
    raise Disconnected(f"no connection to {host}:{port} in {PATIENCE:.0f} s")


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
        except ConnectionRejected as refusal:
            given = {name.decode().lower(): value.decode("latin-1") for name, value in refusal.headers or ()}
            raise NotUpgraded(refusal.status_code, given, refusal.body or b"") from None
        except (HandshakeError, ConnectionClosed, trio.BrokenResourceError, OSError) as error:
            raise Disconnected(f"the handshake failed: {_why(error)}") from None
    raise Disconnected(f"no answer to the handshake in {PATIENCE:.0f} s")


async def history(connection: Connection, conversation_id: int, count: int) -> list[Event]:
    """The newest so many messages, oldest first. Raises Disconnected."""
    found: list[Event] = []
    more = True
    while more and len(found) < count:
        before = {"before": found[0]["id"]} if found else {}
        limit = min(HISTORY_PAGE_MAX, count - len(found))
        page = await connection.request("history", conversation_id=conversation_id, limit=limit, **before)
        found = page.get("messages", []) + found
        more = page.get("has_more", False)
    return found


class Follower:
    """Follows one room for as long as it can: events go to `tell`, each change once and in order.

    `log_in` gives a fresh token for each connection. `notice` gets a sentence when the connection is lost, and
    when it is back. What a resume could not bring back is `lost`.
    """

    def __init__(
        self,
        url: str,
        conversation_id: int,
        *,
        log_in: Callable[[], str],
        tell: Callable[[Event], None],
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._url, self._room, self._log_in = url, conversation_id, log_in
        self._tell, self._notice = tell, notice
        self._cursor: int | None = None
        self._epoch: str | None = None
        self._attempts = 0
        self._troubled = False

    async def run(self, first: Callable[[Connection, Event], Any] | None = None) -> None:
        """Until cancelled. `first` is awaited once, with the connection and what `subscribed` said.

        Raises Refused.
        """
        while True:
            ready_at: float | None = None
            pause = (0.0, 0.0)
            try:
                async with connect(self._url) as connection:
                    await self._enter(connection, first)
                    first, ready_at = None, trio.current_time()
                    pause = await self._listen(connection)
            except Disconnected as end:
                if end.final:
                    raise Refused(end.code, f"{end} ({end.code})") from None
                self._say_lost(end)
                if ready_at is not None and trio.current_time() - ready_at > LIVED:
                    self._attempts = 0
                pause = (0.0, min(RETRY_MOST, RETRY_FIRST * 2**self._attempts))
                self._attempts = min(self._attempts + 1, 16)
            await trio.sleep(random.uniform(*pause))

    async def _enter(self, connection: Connection, first: Callable[[Connection, Event], Any] | None) -> None:
        fields = {"epoch": self._epoch} if self._epoch else {}
        rooms = {str(self._room): self._cursor}
        ready = await connection.request("auth", token=self._log_in(), rooms=rooms, **fields)
        if ready["event"] == "error" and ready.get("retryable"):
            raise Disconnected(ready["message"])
        if ready["event"] == "error":
            raise Refused(ready["code"], ready["message"])
        place = ready["rooms"].get(str(self._room))
        while place is None:  # not let in, which comes as an event of its own
            self._check_let_in(await connection.next())
        if self._troubled:
            self._troubled = False
            self._notice("Connected again.")
        if first is not None:
            await first(connection, place)
        self._take_place(place | {"epoch": ready.get("epoch")})

    def _take_place(self, place: Event) -> None:
        """What a (re)subscription brings: all that was missed, or the word that it is too much."""
        if self._cursor is not None:
            if not place.get("recovered"):
                self._notice("Too much was missed to have it all: these are the newest messages.")
            for change in place.get("changes", ()):
                self._tell(change)
        self._cursor, self._epoch = place["seq"], place.get("epoch") or self._epoch

    async def _listen(self, connection: Connection) -> tuple[float, float]:
        """Until the server asks for another connection: the seconds between which to come back."""
        while True:
            event = await connection.next()
            if event["event"] == "reconnect":
                least, most = event["delay"]
                self._say_lost(Disconnected("the server asks to"))
                return least / 1000, most / 1000
            self._check_let_in(event)
            if event["event"] == "subscribed":
                self._take_place(event)
            elif event["event"] in CHANGES and "seq" in event:
                await self._take_change(connection, event)
            elif event.get("conversation_id") == self._room:
                self._tell(event)

    async def _take_change(self, connection: Connection, event: Event) -> None:
        assert self._cursor is not None
        if event["seq"] == self._cursor + 1:
            self._cursor += 1  # first: what `tell` raises shall not bring it twice
            self._tell(event)
        elif event["seq"] > self._cursor:
            fields = {"after": self._cursor, "epoch": self._epoch}
            await connection.send("subscribe", conversation_id=self._room, **fields)

    def _check_let_in(self, event: Event) -> None:
        if event["event"] == "unsubscribed":
            raise Refused(event["code"], event["message"])

    def _say_lost(self, end: Disconnected) -> None:
        if not self._troubled:
            self._troubled = True
            self._notice(f"Connecting again: {end}{f' ({end.code})' if end.code else ''}.")


def _disconnected(end: ConnectionClosed) -> Disconnected:
    if end.reason is None:
        return Disconnected("the connection was cut")
    return Disconnected(end.reason.reason or end.reason.name or "the connection was closed", end.reason.code)


def _why(error: BaseException) -> str:
    """The innermost reason, in a line."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, OSError | trio.BrokenResourceError) and error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
