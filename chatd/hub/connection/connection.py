"""One WebSocket connection from its first byte to its goodbye: with `upgrade` and client.py the only place that
knows trio_websocket.

`serve` is the barrier: whatever a peer sends, its error ends here. The session above knows nothing of
handshakes, and the send_queue below nothing of WebSocket but that its own frames pass through it.
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
from chatd.hub.connection.heartbeat import Ping
from chatd.hub.connection.send_queue import LINGER_PAUSE, LINGER_SECONDS, SendQueue
from chatd.hub.services import Services
from chatd.hub.session.session import Session
from chatd.hub.session.trivial import TrivialSession
from chatd.net.lobby import Stay, key_of
from chatd.observe import metrics
from chatd.observe.logs import Recurring

RECEIVE_BYTES = 4096  # of one read: chat is small, and this is held per connection
ANSWER_TIMEOUT = 2.0  # seconds for commands at the writer, before a goodbye
PACE_BYTES = 32 * 1024  # of a long answer that may still wait when more of it is read and sent
CLOSE_TIMEOUT = 2.0  # seconds a peer has to answer our goodbye
ACCEPT_SECONDS = 0.5  # of a handshake's time that are left for its answer, where the login of a URL takes long
RETRY_AFTER = b"5"  # seconds, in the answer to a handshake refused for overload

# What peers bring about: they vanish, dawdle, or send what is no WebSocket. The last is raised by the library's
# reader for a non-ASCII byte in some headers.
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

# A peer may close with any of thousands of codes: they are not all worth a time series.
_OURS = {int(code) for code in Close} | {way.code for way in Final}

_PING_EVENT = text_frame(b'{"event":"ping"}')

log = structlog.get_logger()
_broken = Recurring("connection_error")
_refusals = TokenBucket(rate=1, burst=10, now=0)  # lines in the log


async def serve(services: Services, stream: trio.SocketStream, connected: dict[Connection, None]) -> None:
    """Serve one peer, who is among the `connected` from handshake to end. Only Cancelled leaves this; the
    caller closes the stream.
    """
    send_queue: SendQueue | None = None
    stay: Stay | None = None
    admitted: list[Admission] = []  # at most one: it counts until its descriptor is free
    try:
        try:
            async with trio.open_nursery() as nursery:
                # Four bytes a character at most: trio-websocket counts characters, and is to answer 1009 first.
                most = 4 * services.settings.now.limits.frame_bytes + RECEIVE_BYTES
                send_queue = SendQueue(stream, nursery, unfinished_bytes=most)
                stay = Stay(services.lobby, stream, key_of(stream), send_queue.abort)
                await _talk(services, stay, connected, send_queue, nursery, admitted)
        except* _EXPECTED as group:
            metrics.FAILED.inc()
            log.debug("connection_failed", error=_named(group))
        except* Exception as group:
            # A mistake of ours, or of a library: still one connection's matter.
            metrics.FAILED.inc()
            _broken.warn(error=_named(group), exc_info=group)
        if send_queue is not None:
            await send_queue.linger(LINGER_SECONDS if admitted else LINGER_PAUSE)
    finally:
        for admission in admitted:
            admission.give_back()
        if stay is not None:
            stay.leave()
        if send_queue is not None:
            send_queue.let_go()


async def _talk(
    services: Services,
    stay: Stay,
    connected: dict[Connection, None],
    send_queue: SendQueue,
    nursery: trio.Nursery,
    admitted: list[Admission],
) -> None:
    """From the handshake to the goodbye. Nothing of this connection runs in the nursery after that."""
    try:
        if opened := await _shake_hands(services, stay, send_queue, nursery, admitted):
            connection, session = opened
            del opened  # a frame that lives as long as a connection keeps no more than it needs
            connected[connection] = None
            try:
                await connection.run(session)
            finally:
                del connected[connection]
                connection.untie()
    finally:
        nursery.cancel_scope.cancel()


async def _shake_hands(
    services: Services, stay: Stay, send_queue: SendQueue, nursery: trio.Nursery, admitted: list[Admission]
) -> tuple[Connection, Session] | None:
    """None for a peer who was refused, and told so."""
    registry = services.registry
    deadline = trio.current_time() + services.settings.now.hub.handshake_timeout
    with trio.fail_at(deadline):
        request = await _request(send_queue, nursery, services.settings.now.limits.frame_bytes)
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
        connection = Connection(send_queue, nursery, stay, flat=handshake.flat)
        kind = TrivialSession if handshake.flat else Session
        session = kind(services, connection, handshake, address)
        try:
            await session.prepare(deadline - ACCEPT_SECONDS)
            connection.open(await request.accept(subprotocol=upgrade.chosen(handshake)))
        except BaseException:
            session.end()
            raise
    send_queue.message_finished()
    return connection, session


async def _request(send_queue: SendQueue, nursery: trio.Nursery, frame_bytes: int) -> WebSocketRequest:
    """What `trio_websocket.wrap_server_stream` does, with a handshake that reads list headers as lists."""
    protocol = WSConnection(ConnectionType.SERVER)
    protocol.handshake = upgrade.Joining(ConnectionType.SERVER)
    ws = WebSocketConnection(
        send_queue,
        protocol,
        max_message_size=frame_bytes,
        message_queue_size=1,
        receive_buffer_size=RECEIVE_BYTES,
    )
    nursery.start_soon(ws._reader_task)
    return await ws._get_request()


def _log_refusal(refusal: Refused, request: WebSocketRequest) -> None:
    """An operator must see why browsers stay away; a flood must not fill the log."""
    if not _refusals.take(trio.current_time()):
        origin = next((value for name, value in request.headers if name.lower() == b"origin"), b"")
        advice = {"advice": "add it to hub.origins"} if refusal.reason == "foreign_origin" else {}
        log.warning("handshake_refused", reason=refusal.reason, origin=origin[:200].decode("latin-1"), **advice)


async def _refuse(request: WebSocketRequest, refusal: Refused) -> None:
    headers = [(b"retry-after", RETRY_AFTER)] if refusal.status == 503 else []
    await request.reject(refusal.status, extra_headers=headers, body=refusal.reason.encode())


class Connection:
    """An open WebSocket. `push` and `close_soon` never wait; only the connection's own task says goodbye."""

    __slots__ = (
        *("_at_deadline", "_flat", "_goodbye", "_one_answer", "_send_queue", "_ping", "_reading", "_ws"),
        *("known", "name", "nursery", "offer", "our_turn", "push", "reply", "try_push"),
    )

    _ws: WebSocketConnection

    def __init__(self, send_queue: SendQueue, nursery: trio.Nursery, stay: Stay, *, flat: bool) -> None:
        """`open` must follow, before anything is pushed. `stay` ends once the peer has a valid token."""
        self.known, self.our_turn = stay.leave, stay.our_turn
        self._send_queue, self.nursery, self._flat = send_queue, nursery, flat
        # Called for each delivery, so nothing stands between.
        self.push, self.try_push = send_queue.push, send_queue.try_push
        self.offer, self.reply = send_queue.offer, send_queue.reply
        self._goodbye: tuple[int, str] | None = None
        self._at_deadline = (Close.NO_AUTH, "no auth in time")
        self._reading = trio.CancelScope()
        self._ping: Ping | None = None  # the one that waits for its answer
        self._one_answer: trio.Lock | None = None
        self.name = secrets.token_hex(8)

    def open(self, ws: WebSocketConnection) -> None:
        """The handshake is done."""
        self._ws = ws

    def untie(self) -> None:
        """Nothing more is read. wsproto's parser and its generator hold each other: they would stay in memory
        until Python looks for old cycles. The pinned version has no public name for letting them go.
        """
        frames = self._ws._wsproto.handshake.connection
        if frames is not None:
            frames._proto._parse_more.close()

    async def run(self, session: Session) -> None:
        try:
            with self._reading:
                await session.run()
            if self._goodbye is None and self._reading.cancelled_caught:
                self._goodbye = self._at_deadline
        except ConnectionClosed:
            pass
        finally:
            await self._answer_all(session)
            await self._say_goodbye(session.user_id)

    async def next_message(self) -> str | bytes:
        await self._send_queue.uncongested()
        message = await self._ws.get_message()
        self._send_queue.message_finished()
        return message

    @asynccontextmanager
    async def unhurried(self) -> AsyncIterator[None]:
        """A block for a long answer. A client that asked for thirty pages of history is no slow reader."""
        turn = self._one_answer = self._one_answer or trio.Lock()
        async with turn:
            await self.drained()
            yield
        if not turn.locked():  # nobody waits: most connections need it once
            self._one_answer = None

    async def _answer_all(self, session: Session) -> None:
        """What was committed is answered before the goodbye. Past the deadline the outcome is unknown to the
        client, as it is when a connection breaks.
        """
        if self._ws.closed is None and not self._send_queue.cut:
            with trio.move_on_after(ANSWER_TIMEOUT, shield=True):
                await session.all_answered()

    async def drained(self) -> None:
        await self._send_queue.below(PACE_BYTES)

    async def _say_goodbye(self, user_id: int) -> None:
        code: int
        code, reason = self._goodbye or (Close.SERVER_ERROR, "")
        if self._send_queue.too_slow:
            code = Close.TOO_SLOW
            metrics.SLOW.inc()
        elif self._ws.closed is not None and self._goodbye is None:
            code = self._ws.closed.code
        metrics.CLOSED.labels(str(int(code)) if code in _OURS else "peer").inc()
        if user_id:
            log.info("closed", conn=self.name, user_id=user_id, code=int(code), reason=reason)
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._ws.aclose(int(code), reason)
            # The pinned version gives up a peer that broke the protocol without telling it, and has no public
            # name for how far both ends have come.
            if self._ws._wsproto.state is ConnectionState.OPEN:
                goodbye = self._ws._wsproto.send(CloseConnection(code=int(code), reason=reason))
                await self._send_queue.send_all(goodbye)
        if self._ws._wsproto.state is ConnectionState.CLOSED:
            self._send_queue.peer_finished = True

    # For the session and the hub: synchronous.

    def tell(self, frame: bytes) -> None:
        """An event of the server's own, which a flat client knows nothing of."""
        if not self._flat:
            self.push(frame)

    @property
    def ended(self) -> bool:
        return self._send_queue.ended or self._send_queue.cut

    def close_soon(self, code: Close, reason: str) -> None:
        self._end(code, reason)

    def close_for_good(self, way: Final) -> None:
        self._end(way.code, way.sentence)

    def _end(self, code: int, reason: str) -> None:
        if self._goodbye is None:
            self._goodbye = (code, reason)
            self._send_queue.ended = True
            self._reading.cancel()

    def close_at(self, deadline: float, code: Close, reason: str) -> None:
        """Say this goodbye at a moment of trio's clock, unless told otherwise before."""
        self._at_deadline = (code, reason)
        self._reading.deadline = deadline

    def answered(self) -> None:
        """The peer has answered a ping."""
        if self._ping is not None:
            metrics.PING_RTT.observe(trio.current_time() - self._ping.at)
            self._ping = None

    def excuse(self, now: float) -> None:
        """Do not hold the peer's silence until now against it."""
        self._send_queue.last_heard = now

    def beat(self, now: float, interval: float, timeout: float) -> None:
        """Ask a silent peer for a sign of life, give up one that has had its time."""
        self._send_queue.check_drain(now)
        if self._send_queue.ended or self._send_queue.cut:
            return
        if self._ping is not None and self._ping.answered:
            self._ping = None
        if self._ping is not None:
            if self._ping.silence(now) > timeout:
                self.close_soon(Close.NO_PONG, "no sign of life")
        elif now - self._send_queue.last_heard >= interval:
            self._send_ping(now)

    def probe(self) -> None:
        """Ask for a sign of life now. Who waits for the answer to its handshake has just given one, and a ping
        would come before that answer."""
        if self._send_queue.answered and (self._ping is None or self._ping.answered):
            self._send_ping(trio.current_time())

    def silent_for(self, now: float) -> float:
        """Seconds without a sign of life since it was asked for one; 0.0 if it has given it."""
        return 0.0 if self._ping is None or self._ping.answered else max(self._ping.silence(now), 1e-3)

    def _send_ping(self, now: float) -> None:
        if self._flat:
            self._send_queue.expect_pong(PING_FRAME)
            self.push(PING_FRAME)
        else:
            self.push(_PING_EVENT)
        self._ping = Ping(self._send_queue, now)


def _named(group: BaseException) -> str:
    error = innermost(group)
    return f"{type(error).__name__}: {error}"
