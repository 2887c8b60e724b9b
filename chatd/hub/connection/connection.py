"""One WebSocket connection, from its first byte to its close frame. Only this module, `upgrade` and
`ops/client.py` use trio_websocket.

`serve` is the barrier: no error that a peer causes leaves it. The session above knows nothing of handshakes.
The stream below knows nothing of WebSocket, except that it recognizes pongs and close frames.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import trio
from trio_websocket import (
    ConnectionClosed,
    HandshakeError,
    WebSocketConnection,
    WebSocketRequest,
)
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.utilities import ProtocolError

from chatd.core.errors import Close, Final, innermost
from chatd.core.limits import TokenBucket
from chatd.core.protocol import PING_FRAME, text_frame
from chatd.hub.admission.registry import Admission, Refused
from chatd.hub.connection import upgrade
from chatd.hub.connection.ping import Ping
from chatd.hub.connection.stream import LINGER_PAUSE, LINGER_SECONDS, PeerStream
from chatd.hub.services import Services
from chatd.hub.session.session import Session
from chatd.hub.session.trivial import TrivialSession
from chatd.net.lobby import Stay, key_of
from chatd.observe import metrics
from chatd.observe.logs import Recurring

RECEIVE_BYTES = 4096  # bytes of one read: chat messages are small, and each connection holds such a buffer
ANSWER_TIMEOUT = 2.0  # seconds that the close frame waits for replies to commands that the writer has
PACE_BYTES = 32 * 1024  # queued bytes below which the next part of a long answer is read and sent
CLOSE_TIMEOUT = 2.0  # seconds that a peer has to answer the server's close frame
ACCEPT_SECONDS = 0.5  # seconds of the handshake's time that are kept for its answer, if a URL's login is slow
RETRY_AFTER = b"5"  # seconds, in the answer to a handshake that is refused for overload

# Errors that peers cause: they vanish, are too slow, or do not speak WebSocket.
_EXPECTED = (
    ConnectionClosed,
    HandshakeError,
    ProtocolError,
    trio.TooSlowError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    OSError,
    UnicodeError,
)

# A peer may close with any of thousands of codes. One time series for each would be too many.
_OURS = {int(code) for code in Close} | {way.code for way in Final}

_PING_EVENT = text_frame(b'{"event":"ping"}')

log = structlog.get_logger()
_broken = Recurring("connection_error")
_refusals = TokenBucket(rate=1, burst=10, now=0)  # limits the log lines about refused handshakes


async def serve(services: Services, tcp: trio.SocketStream, connected: dict[Connection, None]) -> None:
    """Serve one peer, and keep its connection in `connected` from the handshake to the end.

    Raises nothing but Cancelled. The caller closes `tcp`.
    """
    stream: PeerStream | None = None
    stay: Stay | None = None
    admitted: list[Admission] = []  # at most one; it is given back when the connection's descriptor is free
    try:
        try:
            async with trio.open_nursery() as nursery:
                # A character has four bytes at most. trio-websocket counts characters, and it shall answer a
                # message that is too big with 1009 before this limit cuts the connection.
                most = 4 * services.settings.now.limits.frame_bytes + RECEIVE_BYTES
                stream = PeerStream(tcp, nursery, unfinished_bytes=most)
                stay = Stay(services.lobby, tcp, key_of(tcp), stream.abort)
                await _talk(services, stay, connected, stream, nursery, admitted)
        except* _EXPECTED as group:
            metrics.FAILED.inc()
            log.debug("connection_failed", error=_named(group))
        except* Exception as group:
            # A bug of chatd or of a library. It ends this connection only.
            metrics.FAILED.inc()
            _broken.warn(error=_named(group), exc_info=group)
        if stream is not None:
            await stream.linger(LINGER_SECONDS if admitted else LINGER_PAUSE)
    finally:
        for admission in admitted:
            admission.give_back()
        if stay is not None:
            stay.leave()
        if stream is not None:
            stream.let_go()


async def _talk(
    services: Services,
    stay: Stay,
    connected: dict[Connection, None],
    stream: PeerStream,
    nursery: trio.Nursery,
    admitted: list[Admission],
) -> None:
    """Run the connection from the handshake to the close frame. Afterwards no task is left in its nursery."""
    try:
        if opened := await _shake_hands(services, stay, stream, nursery, admitted):
            connection, session = opened
            del opened  # this frame lives as long as the connection: it shall not keep the tuple alive
            connected[connection] = None
            try:
                await connection.run(session)
            finally:
                del connected[connection]
                connection.untie()
    finally:
        nursery.cancel_scope.cancel()


async def _shake_hands(
    services: Services, stay: Stay, stream: PeerStream, nursery: trio.Nursery, admitted: list[Admission]
) -> tuple[Connection, Session] | None:
    """Make the handshake. Returns None for a peer that was refused, after the refusal was sent."""
    registry = services.registry
    deadline = trio.current_time() + services.settings.now.hub.handshake_timeout
    with trio.fail_at(deadline):
        request = await _request(stream, nursery, services.settings.now.limits.frame_bytes)
        try:
            handshake = upgrade.read(request)
            peer = str(stay.stream.socket.getpeername()[0])
            address = registry.address_of(peer, handshake.forwarded_for)
            stay.enter(registry.guesser(address) or "")
            admitted.append(registry.admit(handshake, address))
        except Refused as refusal:
            metrics.REJECTED.labels(refusal.reason).inc()
            _log_refusal(refusal, request)
            await _refuse(request, refusal)
            return None
        connection = Connection(stream, nursery, stay, flat=handshake.flat)
        kind = TrivialSession if handshake.flat else Session
        session = kind(services, connection, handshake, address)
        try:
            await session.prepare(deadline - ACCEPT_SECONDS)
            connection.open(await request.accept(subprotocol=upgrade.chosen(handshake)))
        except BaseException:
            session.end()
            raise
    stream.message_finished()
    return connection, session


async def _request(stream: PeerStream, nursery: trio.Nursery, frame_bytes: int) -> WebSocketRequest:
    """Read the upgrade request, as `trio_websocket.wrap_server_stream` does, but join list headers that the
    client or a proxy has spread over several lines.
    """
    protocol = WSConnection(ConnectionType.SERVER)
    protocol.handshake = upgrade.Joining(ConnectionType.SERVER)
    ws = WebSocketConnection(
        stream,
        protocol,
        max_message_size=frame_bytes,
        message_queue_size=1,
        receive_buffer_size=RECEIVE_BYTES,
    )
    nursery.start_soon(ws._reader_task)
    return await ws._get_request()


def _log_refusal(refusal: Refused, request: WebSocketRequest) -> None:
    """The operator must see in the log why browsers cannot connect, but a flood must not fill the log."""
    if not _refusals.take(trio.current_time()):
        origin = next((value for name, value in request.headers if name.lower() == b"origin"), b"")
        advice = {"advice": "add it to hub.origins"} if refusal.reason == "foreign_origin" else {}
        log.warning("handshake_refused", reason=refusal.reason, origin=origin[:200].decode("latin-1"), **advice)


async def _refuse(request: WebSocketRequest, refusal: Refused) -> None:
    headers = [(b"retry-after", RETRY_AFTER)] if refusal.status == 503 else []
    await request.reject(refusal.status, extra_headers=headers, body=refusal.reason.encode())


class Connection:
    """An open WebSocket. `push` and `close_soon` never wait. Only the connection's own task sends close
    frames.
    """

    __slots__ = (
        *("_at_deadline", "_flat", "_closing", "_one_answer", "_stream", "_ping", "_reading", "_ws"),
        *("known", "name", "nursery", "offer", "our_turn", "push", "reply", "try_push"),
    )

    _ws: WebSocketConnection

    def __init__(self, stream: PeerStream, nursery: trio.Nursery, stay: Stay, *, flat: bool) -> None:
        """The caller must call `open` before anything is pushed. `stay` ends when the peer has a valid
        token.
        """
        self.known, self.our_turn = stay.leave, stay.our_turn
        self._stream, self.nursery, self._flat = stream, nursery, flat
        # These are called for each delivery: binding them here saves a call each time.
        self.push, self.try_push = stream.push, stream.try_push
        self.offer, self.reply = stream.offer, stream.reply
        self._closing: tuple[int, str] | None = None
        self._at_deadline = (Close.NO_AUTH, "no auth in time")
        self._reading = trio.CancelScope()
        self._ping: Ping | None = None  # the ping that is not answered yet
        self._one_answer: trio.Lock | None = None
        self.name = secrets.token_hex(8)

    def open(self, ws: WebSocketConnection) -> None:
        """The handshake has succeeded: `ws` can send and receive."""
        self._ws = ws

    def untie(self) -> None:
        """Free wsproto's parser, when nothing more is read. The parser and its generator refer to each other,
        so they would stay in memory until Python collects the oldest generation. The pinned version has no
        public name for this.
        """
        frames = self._ws._wsproto.handshake.connection
        if frames is not None:
            frames._proto._parse_more.close()

    async def run(self, session: Session) -> None:
        try:
            with self._reading:
                await session.run()
            if self._closing is None and self._reading.cancelled_caught:
                self._closing = self._at_deadline
        except ConnectionClosed:
            pass
        finally:
            await self._answer_all(session)
            await self._send_close(session.user_id)

    async def next_message(self) -> str | bytes:
        await self._stream.uncongested()
        message = await self._ws.get_message()
        self._stream.message_finished()
        return message

    @asynccontextmanager
    async def unhurried(self) -> AsyncIterator[None]:
        """A block that sends a long answer, after the earlier ones have been read. So a client that requests
        thirty pages of history at once does not become a slow consumer.
        """
        turn = self._one_answer = self._one_answer or trio.Lock()
        async with turn:
            await self.drained()
            yield
        if not turn.locked():  # no other block waits: most connections need the lock once, so free it
            self._one_answer = None

    async def _answer_all(self, session: Session) -> None:
        """Wait until replies were sent for all commands at the writer, so that they precede the close frame.
        After ANSWER_TIMEOUT the client does not learn the outcome, as when a connection breaks.
        """
        if self._ws.closed is None and not self._stream.cut:
            with trio.move_on_after(ANSWER_TIMEOUT, shield=True):
                await session.all_answered()

    async def drained(self) -> None:
        await self._stream.below(PACE_BYTES)

    async def _send_close(self, user_id: int) -> None:
        code: int
        code, reason = self._closing or (Close.SERVER_ERROR, "")
        if self._stream.too_slow:
            code = Close.TOO_SLOW
            metrics.SLOW.inc()
        elif self._ws.closed is not None and self._closing is None:
            code = self._ws.closed.code
        metrics.CLOSED.labels(str(int(code)) if code in _OURS else "peer").inc()
        if user_id:
            log.info("closed", conn=self.name, user_id=user_id, code=int(code), reason=reason)
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._ws.aclose(int(code), reason)
            # When a peer has broken the protocol, the pinned version sends no close frame. It also has no
            # public name for the state of the connection.
            if self._ws._wsproto.state is ConnectionState.OPEN:
                frame = self._ws._wsproto.send(CloseConnection(code=int(code), reason=reason))
                await self._stream.send_all(frame)
        if self._ws._wsproto.state is ConnectionState.CLOSED:
            self._stream.peer_finished = True

    # For the session and the hub: synchronous.

    def tell(self, frame: bytes) -> None:
        """Push an event that is not the reply to a command. A flat client gets none: it knows only messages."""
        if not self._flat:
            self.push(frame)

    @property
    def ended(self) -> bool:
        return self._stream.ended or self._stream.cut

    def close_soon(self, code: Close, reason: str) -> None:
        self._end(code, reason)

    def close_for_good(self, way: Final) -> None:
        self._end(way.code, way.sentence)

    def _end(self, code: int, reason: str) -> None:
        if self._closing is None:
            self._closing = (code, reason)
            self._stream.ended = True
            self._reading.cancel()

    def close_at(self, deadline: float, code: Close, reason: str) -> None:
        """Send this close frame at `deadline` (trio's clock), unless a later call moves the deadline."""
        self._at_deadline = (code, reason)
        self._reading.deadline = deadline

    def answered(self) -> None:
        """The peer has answered a ping."""
        if self._ping is not None:
            metrics.PING_RTT.observe(trio.current_time() - self._ping.at)
            self._ping = None

    def excuse(self, now: float) -> None:
        """Treat the peer as heard at `now`, so that its silence before does not count."""
        self._stream.last_heard = now

    def beat(self, now: float, interval: float, timeout: float) -> None:
        """Ping a peer that was silent for `interval` seconds; close it `timeout` seconds after the ping."""
        self._stream.check_drain(now)
        if self._stream.ended or self._stream.cut:
            return
        if self._ping is not None and self._ping.answered:
            self._ping = None
        if self._ping is not None:
            if self._ping.silence(now) > timeout:
                self.close_soon(Close.NO_PONG, "no sign of life")
        elif now - self._stream.last_heard >= interval:
            self._send_ping(now)

    def probe(self) -> None:
        """Send a ping now, unless the handshake is not answered yet: that peer has just sent its request, and
        the ping would precede the answer.
        """
        if self._stream.answered and (self._ping is None or self._ping.answered):
            self._send_ping(trio.current_time())

    def silent_for(self, now: float) -> float:
        """Return the seconds that the peer has been silent since a ping; 0.0 if it has answered the ping."""
        return 0.0 if self._ping is None or self._ping.answered else max(self._ping.silence(now), 1e-3)

    def _send_ping(self, now: float) -> None:
        if self._flat:
            self._stream.expect_pong(PING_FRAME)
            self.push(PING_FRAME)
        else:
            self.push(_PING_EVENT)
        self._ping = Ping(self._stream, now)


def _named(group: BaseException) -> str:
    error = innermost(group)
    return f"{type(error).__name__}: {error}"
