"""One HTTP connection. It answers each request before it reads the next one.

Hypercorn accepts connections and h11 parses the bytes; this module is between the two. It replaces Hypercorn's
own connection, which may close an idle connection at the moment when a request arrives, answers 400 to a line
break after the last body, and cancels a request whose client has closed its sending side.

The rule: a request that was read completely goes to the application, and its answer goes to the client, unless
the process or the client ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from math import inf
from typing import Any
from urllib.parse import unquote

import h11
import msgspec
import trio
from hypercorn.config import Config, Sockets

from chatd.api.errors import body_of, unforeseen
from chatd.api.leave import Leave
from chatd.api.schemas import RESPONSE_SECONDS
from chatd.api.strangers import Strangers
from chatd.core.errors import ChatError, Unavailable, innermost
from chatd.net.lobby import Lobby, Stay, key_of
from chatd.observe import metrics
from chatd.observe.logs import Recurring

KEEP_ALIVE = 75.0  # seconds without a request; longer than backends' connection pools keep idle connections
IDLE = 10.0  # the same for a connection that has not sent the token
HEAD_SECONDS = 10.0  # seconds for a request's head, from its first byte
HEAD_BYTES = 16 * 1024
RECEIVE_BYTES = 64 * 1024
JOIN_BYTES = 64 * 1024  # bytes of an answer that one write joins
LINGER = 1.0  # seconds for the client to read the last answer
UNWANTED_BYTES = 2 * 1024 * 1024  # longest rest of a body that is read only so that the client sees the answer
UNWANTED_SECONDS = 3.0  # most time for reading it

LAST_REQUEST = 3.0  # during a stop: seconds for the rest of a request that has begun to arrive
FIRST_BYTE = 0.5  # during a stop: seconds for a new connection to begin its first request

_LINE_BREAKS = b"\r\n"
_NO_BODY = frozenset({204, 304})
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)

_broken = Recurring("http_connection_error")


class HypercornConfig(Config):
    """Hypercorn's configuration, with the listening socket and the objects that all connections share."""

    leave: Leave
    lobby: Lobby
    strangers: Strangers
    is_token: Callable[[Sequence[bytes]], bool]  # given the values of all X-Internal-Token headers
    listening: socket.socket

    def create_sockets(self) -> Sockets:
        return Sockets([], [self.listening], [])


class Refusal(Exception):
    """The client's bytes are not a valid request, or arrive too slowly: it gets this error, and the connection
    ends.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Connection:
    """Replaces Hypercorn's `TCPServer`: Hypercorn calls it with these arguments and awaits it."""

    _stay: Stay

    def __init__(
        self, app: Any, config: HypercornConfig, context: Any, state: Any, stream: trio.SocketStream
    ) -> None:
        self._app, self._config, self._stream = app, config, stream
        self._leave = config.leave
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._peer_finished = False  # the client has closed its sending side
        self._refused = False
        self._served = 0
        self._known = False  # a request on this connection had the API's token
        # The state of the current request.
        self._read_all = False
        self._head: h11.Response | None = None
        self._unsent = b""
        self._has_body = True

    def __await__(self) -> Any:
        return self._run().__await__()

    async def _run(self) -> None:
        """Serve the connection. No error that a client causes leaves this. The caller closes the stream."""
        lobby = self._config.lobby
        if lobby.full and not lobby.make_room(hurry=lobby.overfull) and lobby.overfull:
            lobby.count_ended()
            return
        try:
            with trio.CancelScope() as waiting:
                self._stay = Stay(lobby, self._stream, key_of(self._stream), waiting.cancel)
                try:
                    await self._serve()
                finally:
                    self._stay.leave()
        except* _GONE:
            pass
        except* Exception as group:
            # A bug of chatd or of a library. It ends this connection only.
            metrics.HTTP_FAILED.inc()
            _broken.warn(error=repr(innermost(group)), exc_info=group)
        finally:
            self._leave.done += 1

    async def _serve(self) -> None:
        """Answer requests until the connection ends. It has a stay until the client sends the token."""
        try:
            while (request := await self._next_request()) is not None:
                if self._is_known(request):
                    self._stay.leave()
                    await self._exchange(request)
                else:
                    await self._config.strangers.turn()
                    with self._stay.our_turn():
                        await self._exchange(request)
                self._served += 1
                self._leave.done += 1
                if not self._begin_anew():
                    break
            else:
                return  # no request has arrived, so there is no answer that the client must read
        except Refusal as refusal:
            await self._refuse(refusal)
        await self._let_read()

    def _is_known(self, request: h11.Request) -> bool:
        """Whether this request, or an earlier one on this connection, has the token."""
        if not self._known:
            given = [value for name, value in request.headers if name == b"x-internal-token"]
            self._known = self._config.is_token(given)
        return self._known

    # Reading requests.

    async def _next_request(self) -> h11.Request | None:
        """Wait for the next request. Returns None if the client sends no more. Raises Refusal."""
        if not self._h11.trailing_data[0] and not await self._first_bytes():
            return None
        with self._leave.patience(HEAD_SECONDS, LAST_REQUEST):
            return await self._read_head()
        if self._leave.now:
            raise Refusal(503, "unavailable", "The daemon is stopping.")
        raise Refusal(408, "bad_request", "The request took too long to arrive.")

    async def _first_bytes(self) -> bool:
        """Wait for a request to begin. Returns whether it does. A request that has arrived when the time is
        over is still accepted.
        """
        data = b""
        seconds = KEEP_ALIVE if self._known else IDLE
        with self._leave.patience(seconds, 0.0 if self._served else FIRST_BYTE):
            while not data:
                data = bytes(await self._stream.receive_some(RECEIVE_BYTES))
                if not data:
                    return False
                data = data.lstrip(_LINE_BREAKS)  # some clients send a line break after a body
        if not data:
            data = _arrived(self._stream).lstrip(_LINE_BREAKS)
        if data:
            self._h11.receive_data(data)
        return bool(data)

    async def _read_head(self) -> h11.Request | None:
        event = await self._next_event()
        if not isinstance(event, h11.Request):
            return None
        if event.http_version not in (b"1.0", b"1.1"):
            raise Refusal(505, "bad_request", "This server speaks HTTP/1.1.")
        return event

    async def _next_event(self) -> Any:
        """Return h11's next event, after reading as many bytes as it needs. Raises Refusal."""
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                data = b"" if self._peer_finished else bytes(await self._stream.receive_some(RECEIVE_BYTES))
                self._peer_finished = not data
                self._h11.receive_data(data)
            return event
        except h11.RemoteProtocolError as error:
            # Through its traceback, h11's error refers to itself and to this connection: break the cycle.
            said = str(error.with_traceback(None))
            raise Refusal(error.error_status_hint, "bad_request", f"This is not valid HTTP: {said}.") from None

    # One request and its answer, as ASGI.

    async def _exchange(self, request: h11.Request) -> None:
        self._read_all, self._head, self._unsent = False, None, b""
        self._has_body = request.method != b"HEAD"
        lengths = [int(value) for name, value in request.headers if name == b"content-length"]
        self._announced, self._reading = lengths[0] if lengths else 0, False
        scope = self._scope(request)
        try:
            await self._app(scope, self._receive, self._send, trio.to_thread.run_sync, trio.from_thread.run)
        except _GONE:
            raise
        except Exception as error:
            if self._h11.our_state is not h11.SEND_RESPONSE:
                raise
            refused = _chat_error(error, scope)
            await self._answer(refused.status, body_of(refused))

    def _scope(self, request: h11.Request) -> dict[str, Any]:
        path, _, query = request.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode().upper(),
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": _host_and_port(self._stream.socket.getpeername()),
            "server": _host_and_port(self._stream.socket.getsockname()),
            "state": {},
            "extensions": {},
        }

    async def _receive(self) -> dict[str, Any]:
        """Return a part of the body, or `http.disconnect` if the rest cannot arrive. A client that closes its
        sending side after a complete request is not disconnected: it waits for the answer.

        Raises Unavailable if the daemon stops before the rest has arrived.
        """
        if self._read_all:
            await trio.sleep_forever()
        # No deadline of its own: the application limits the time for a body.
        self._reading = True
        try:
            with self._leave.patience(inf, LAST_REQUEST), self._stay.their_turn():
                return await self._read_body()
        finally:
            self._reading = False
        raise Unavailable("the daemon is stopping")

    async def _read_body(self) -> dict[str, Any]:
        if self._h11.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await self._stream.send_all(self._h11.send(go_on) or b"")
        try:
            event = await self._next_event()
        except (Refusal, *_GONE):
            self._read_all = True
            return {"type": "http.disconnect"}
        if isinstance(event, h11.Data):
            return {"type": "http.request", "body": bytes(event.data), "more_body": True}
        self._read_all = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        """Send a part of the answer. Small parts are joined, so that most answers take a single write."""
        if message["type"] == "http.response.start":
            await self._read_away()
            self._unsent = self._begin_answer(message["status"], list(message["headers"]))
            return
        body = message.get("body", b"") if self._has_body else b""
        if body:
            self._unsent += self._h11.send(h11.Data(data=body)) or b""
        if not message.get("more_body", False):
            self._unsent += self._h11.send(h11.EndOfMessage()) or b""
        elif len(self._unsent) < JOIN_BYTES:
            return
        unsent, self._unsent = self._unsent, b""
        with self._stay.their_turn():
            await self._stream.send_all(unsent)

    async def _read_away(self) -> None:
        """Read the rest of a body that the application does not want, if it is short, before the answer.

        A client that is told to close while it is still sending may fail at its next write, and never read the
        answer: curl does, now and then. Only backends that have shown the token are read so.
        """
        if not self._known or self._reading or self._h11.they_are_waiting_for_100_continue:
            return
        if not 0 < self._announced <= UNWANTED_BYTES:
            return
        self._read_all = True  # from here on the application's task must not read beside this
        with trio.move_on_after(UNWANTED_SECONDS), self._stay.their_turn():
            try:
                while self._h11.their_state is h11.SEND_BODY:
                    await self._next_event()
            except Refusal:
                pass  # what came is no HTTP: after the answer the connection ends

    def _begin_answer(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        self._has_body = self._has_body and status not in _NO_BODY
        if self._refused or self._leave.soon or not self._body_has_come():
            headers.append((b"connection", b"close"))
        headers += self._config.response_headers("h11")
        return self._h11.send(h11.Response(status_code=status, headers=headers)) or b""

    def _body_has_come(self) -> bool:
        """Whether the whole body has arrived. Bytes of it that are left are discarded."""
        try:
            while self._h11.their_state is h11.SEND_BODY and self._h11.next_event() is not h11.NEED_DATA:
                pass
        except h11.RemoteProtocolError:
            return False
        return self._h11.their_state not in (h11.SEND_BODY, h11.ERROR)

    async def _answer(self, status: int, body: dict[str, Any]) -> None:
        """Send an answer that the application has not produced."""
        text = msgspec.json.encode(body) + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        with trio.move_on_after(RESPONSE_SECONDS):
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
            await self._send({"type": "http.response.body", "body": text})

    # Between two requests, and after the last.

    def _begin_anew(self) -> bool:
        """Whether another request may follow."""
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        rest, self._peer_finished = self._h11.trailing_data
        if rest[:1] in (b"\r", b"\n"):
            # h11 does not skip a line break after a body, so a new h11 connection gets the bytes after it.
            self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
            if rest := rest.lstrip(_LINE_BREAKS):
                self._h11.receive_data(rest)
        else:
            self._h11.start_next_cycle()
        return bool(rest) or not self._peer_finished

    async def _refuse(self, refusal: Refusal) -> None:
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refused = self._has_body = True
            await self._answer(refusal.status, {"message": str(refusal), "code": refusal.code})

    async def _let_read(self) -> None:
        """Close the sending side, and give the client time to read the answer. Closing the socket while bytes
        are unread, for example the rest of a refused body, would reset the connection and destroy the answer.
        """
        if self._h11.our_state not in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            return  # the answer is incomplete, and a reset shows that to the client
        with trio.move_on_after(LINGER):
            await self._stream.send_eof()
            while not self._peer_finished and await self._stream.receive_some(RECEIVE_BYTES):
                pass


def _chat_error(error: Exception, scope: dict[str, Any]) -> ChatError:
    return error if isinstance(error, ChatError) else unforeseen(error, scope["method"], scope["path"])


def _arrived(stream: trio.SocketStream) -> bytes:
    """Return the bytes that have arrived and were not read yet."""
    try:
        return os.read(stream.socket.fileno(), RECEIVE_BYTES)
    except BlockingIOError:
        return b""


def _host_and_port(address: Any) -> tuple[str, int]:
    return address[0], address[1]
