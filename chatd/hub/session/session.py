"""A session handles one client's `chatd.v1` commands: it calls the use cases and replies.

Commands are read in order. Each write is queued before the next command is read, so that messages keep their
order. Replies are sent after the commit, and may overtake each other.
"""

from __future__ import annotations

from typing import Any

import trio

from chatd.core import protocol
from chatd.core.errors import ChatError, Close, Final, NotFound, NotJSON, RateLimited, Unauthorized
from chatd.core.limits import HISTORY_PAGE
from chatd.core.model import Identity, now
from chatd.core.protocol import event, text_frame
from chatd.hub.admission.registry import Handshake
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.login import Login, seconds_left
from chatd.hub.session.receipts import Receipts
from chatd.hub.session.refusals import LOGIN_ERRORS
from chatd.hub.session.replies import tell_error, tell_ok
from chatd.hub.session.requests import Requests
from chatd.hub.session.subscriptions import Subscriptions
from chatd.hub.session.writes import Write, Writes
from chatd.observe import metrics

_NOWHERE: set[int] = set()  # shared by all sessions that have sent no `typing`, to save memory


class Session:
    """One client, for as long as its connection lives."""

    __slots__ = (
        *("_chat", "_config", "_handshake", "_line", "_login", "_receipts", "_requests"),
        *("_rooms", "_services", "_typing", "_writes", "flat"),
    )

    def __init__(self, services: Services, line: Line, handshake: Handshake, address: str) -> None:
        self._services, self._line = services, line
        self._handshake: Handshake | None = handshake  # None after `run` has used it
        self._config, self._chat = services.settings.now, services.chat
        self.flat = handshake.flat
        self._rooms = Subscriptions(services, line, flat=self.flat)
        self._login = Login(services, line, self._rooms, address)
        self._requests = Requests()
        self._writes = Writes(self._chat, line, self._requests)
        self._receipts: Receipts | None = None
        self._typing: set[int] = _NOWHERE  # conversations for which this connection has sent `typing`

    async def prepare(self, deadline: float) -> None:
        """Do work before the handshake is answered. Nothing may be pushed yet."""

    async def run(self) -> None:
        """Handle commands until the connection ends or this is cancelled; then leave all rooms."""
        try:
            assert self._handshake is not None
            await self._begin(self._handshake)
            self._handshake = None
            while True:
                await self._take(await self._line.next_message())
        finally:
            self.end()

    def end(self) -> None:
        """Leave the rooms and the registry. `run` calls this; the caller does if it never calls `run`."""
        self._rooms.leave_all()
        self._login.leave()
        if self._login.identity is not None:
            self._write_last(self._login.identity)

    def _write_last(self, identity: Identity) -> None:
        """Write the receipts that still wait, and end the user's typing."""
        if self._receipts is not None:
            self._receipts.write(identity)
        for conversation_id in self._typing:
            self._chat.typing.stop(conversation_id, identity.user_id)

    async def _begin(self, handshake: Handshake) -> None:
        if not speaks_ours(handshake):
            self._line.close_for_good(Final.OTHER_PROTOCOL)
            return
        await self._greet(handshake)

    async def _greet(self, handshake: Handshake) -> None:
        deadline = trio.current_time() + self._config.hub.auth_timeout
        self._line.close_at(deadline, Close.NO_AUTH, "no auth in time")
        self._push(self._hello())
        if handshake.bearer is not None:
            await self._guard(self._authenticate, protocol.Auth(token=handshake.bearer))

    def _hello(self) -> bytes:
        config = self._config
        return protocol.hello(
            auth_timeout=config.hub.auth_timeout,
            ping_interval=config.hub.ping_interval,
            ping_timeout=config.hub.ping_timeout,
            frame_bytes=config.limits.frame_bytes,
            content_chars=config.limits.content_chars,
            rooms=config.limits.rooms_per_connection,
            reconnect_window=config.server.drain_window,
        )

    @property
    def user_id(self) -> int:
        """The user's id; 0 for a client that has not logged in."""
        return self._login.user_id

    # Taking commands.

    async def _take(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._line.close_for_good(Final.BINARY_FRAME)
            return
        if len(message.encode()) > self._config.limits.frame_bytes:  # the library counts characters
            self._line.close_soon(Close.TOO_BIG, "this frame is too big")
            return
        try:
            command = protocol.decode_command(message)
        except NotJSON:
            self._line.close_for_good(Final.NO_JSON)
            return
        except protocol.CommandError as error:
            if self._limit_requests(error.ref):
                tell_error(self._line, error.error, error.ref)
            return
        if self._limit_requests(command.ref):
            await self._guard(self._handle, command)

    def _limit_requests(self, ref: Any) -> bool:
        if not (wait := self._requests.take()):
            return True
        self._refuse_rate("requests", ref, wait)
        return False

    def _refuse_rate(self, kind: str, ref: Any, wait: float) -> None:
        metrics.RATE_LIMITED.labels(kind).inc()
        tell_error(self._line, RateLimited(retry_after=round(wait, 3)), ref)
        if self._requests.strike():
            self._line.close_soon(Close.TOO_MANY_REQUESTS, "too many requests")

    async def _guard(self, work: Any, subject: Any, *rest: Any) -> None:
        """Reply with the ChatError that `work` raises. Any other error ends the connection, in its barrier."""
        try:
            await work(subject, *rest)
        except ChatError as error:
            tell_error(self._line, error, subject.ref)

    async def _handle(self, command: protocol.AnyCommand) -> None:
        match command:
            case protocol.Ping():
                self._push(event("pong", command.ref, server_time=now()))
            case protocol.Pong():
                self._line.answered()
            case protocol.Auth():
                await self._authenticate(command)
            case _ if self._login.identity is None:
                raise Unauthorized(message="authenticate first")
            case _:
                await self._handle_of_user(command, self._login.identity)

    async def _handle_of_user(self, command: protocol.AnyCommand, identity: Identity) -> None:
        match command:
            case protocol.Refresh():
                await self._refresh(command, identity)
            case protocol.Subscribe():
                subscription = self._rooms.join(command.conversation_id, presence=bool(command.presence))
                await self._later(self._subscribe, command, subscription)
            case protocol.Unsubscribe():
                self._unsubscribe(command, identity)
            case protocol.History():
                await self._later(self._history, command, identity)
            case protocol.Send() | protocol.Edit() | protocol.Delete() | protocol.React():
                await self._write(command, identity)
            case protocol.Read() | protocol.Delivered():
                self._note_receipt(command, identity)
            case protocol.Typing():
                self._type(command, identity)

    async def _later(self, work: Any, command: protocol.Command, *rest: Any) -> None:
        """Run `work` in a task, so that the next command can be read. At most WAITING requests do so at
        once.
        """
        await self._requests.slot()
        self._line.nursery.start_soon(self._release_after, work, command, *rest)

    async def _release_after(self, work: Any, command: protocol.Command, *rest: Any) -> None:
        try:
            await self._guard(work, command, *rest)
        finally:
            self._requests.free()

    # Authentication.

    async def _authenticate(self, command: protocol.Auth) -> None:
        first = self._login.identity is None
        try:
            await self._login.authenticate(command)
            self._requests.charge_rooms(self._rooms.asked_by(command))
        except LOGIN_ERRORS as error:
            self._login.refuse(error, command.ref, first=first)

    async def _refresh(self, command: protocol.Refresh, identity: Identity) -> None:
        try:
            fresh = await self._login.refresh(command.token, identity)
        except LOGIN_ERRORS as error:
            self._login.refuse(error, command.ref, first=False)
            return
        tell_ok(self._line, command.ref, expires_in=seconds_left(fresh))

    # Being in rooms.

    def _unsubscribe(self, command: protocol.Unsubscribe, identity: Identity) -> None:
        self._rooms.leave(command.conversation_id)
        if command.conversation_id in self._typing:
            self._typing.discard(command.conversation_id)
            self._chat.typing.stop(command.conversation_id, identity.user_id)
        tell_ok(self._line, command.ref)

    def _type(self, command: protocol.Typing, identity: Identity) -> None:
        """Raises NotFound for a room that this connection is not in."""
        if not self._rooms.has_entered(command.conversation_id):
            raise NotFound("subscribe to this conversation first", field="conversation_id")
        if command.active:
            self._typing = self._typing or set()
            self._typing.add(command.conversation_id)
            self._chat.typing.start(command.conversation_id, identity.user_id)
        else:
            self._chat.typing.stop(command.conversation_id, identity.user_id)
        tell_ok(self._line, command.ref)

    def _note_receipt(self, command: protocol.Read | protocol.Delivered, identity: Identity) -> None:
        if self._receipts is None:
            self._receipts = Receipts(self._chat, self._line.nursery, self._requests, self._tell_noted)
        self._receipts.note(command, identity)

    def _tell_noted(self, ref: Any, error: ChatError | None) -> None:
        if error is not None:
            tell_error(self._line, error, ref)
        else:
            tell_ok(self._line, ref)

    # Reading.

    async def _subscribe(self, command: protocol.Subscribe, subscription: Subscription) -> None:
        position = protocol.position_of(command)
        await self._rooms.enter(subscription, position, command.epoch, command.ref)

    async def _history(self, command: protocol.History, identity: Identity) -> None:
        async with self._line.unhurried():
            page = await self._chat.messages.history_for(
                identity.user_id,
                self._chat.conversations.entitled(identity, command.conversation_id),
                command.conversation_id,
                command.before,
                command.after,
                command.limit or HISTORY_PAGE,
            )
            await self._line.drained()  # rooms may have pushed messages meanwhile
            self._push(event("history", command.ref, messages=page.messages, has_more=page.has_more))

    # Writing.

    async def _write(self, command: Write, identity: Identity) -> None:
        if wait := self._services.registry.take_send(self._login.user_id):
            self._refuse_rate("sends", command.ref, wait)
            return
        await self._writes.submit(command, identity)

    # Replying.

    async def all_answered(self) -> None:
        """Wait until the writer has answered each command that this session has submitted."""
        await self._requests.all_written()

    def _push(self, payload: bytes) -> None:
        """Push an event, unless the client is flat: of all events but messages, flat clients get only
        errors.
        """
        if not self.flat:
            self._line.push(text_frame(payload))


def speaks_ours(handshake: Handshake) -> bool:
    return not handshake.subprotocols or protocol.SUBPROTOCOL in handshake.subprotocols
