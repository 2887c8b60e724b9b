"""What a client asks for and gets: `chatd.v1` between a connection and the use cases.

Commands are taken in order. Writes are queued before the next command is read, so that sends keep their
order; their replies come when they are committed, and may overtake each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog
import trio

from chatd.core import protocol
from chatd.core.errors import (
    ChatError,
    Close,
    Final,
    Forbidden,
    NotFound,
    NotJSON,
    Outdated,
    RateLimited,
    TooManyConnections,
    Unauthorized,
    Unavailable,
)
from chatd.core.limits import HISTORY_PAGE
from chatd.core.model import Identity, now
from chatd.core.protocol import event, text_frame
from chatd.hub.admission.half_open import end_most_silent
from chatd.hub.admission.registry import Handshake
from chatd.hub.fanout.rooms import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.receipts import Receipts
from chatd.hub.session.refusals import LOGIN_ERRORS, goodbye_for, refused
from chatd.hub.session.requests import Requests
from chatd.hub.session.subscriptions import Subscriptions
from chatd.hub.session.writes import Write, to_store
from chatd.observe import metrics
from chatd.store.write.commands import Changed, Create, Created, Edit
from chatd.store.write.submission import Outcome

_NOWHERE: set[int] = set()  # for all who have never typed

log = structlog.get_logger()


class Session:
    """One client, for as long as its connection lives."""

    __slots__ = (
        *("_address", "_chat", "_config", "_handshake", "_line", "_receipts", "_requests"),
        *("_rooms", "_services", "_typing", "flat", "identity", "present", "user_id"),
    )

    def __init__(self, services: Services, line: Line, handshake: Handshake, address: str) -> None:
        self._services, self._line, self._address = services, line, address
        self._handshake: Handshake | None = handshake  # until it has been looked at
        self._config, self._chat = services.settings.now, services.chat
        self.flat = handshake.flat
        self.present = False  # others see that the user is online
        self._rooms = Subscriptions(services, line, flat=self.flat)
        self._requests = Requests()
        self._receipts: Receipts | None = None
        self._typing: set[int] = _NOWHERE  # conversations where the user has been typing on this connection
        self.identity: Identity | None = None
        self.user_id = 0

    async def prepare(self, deadline: float) -> None:
        """What is to be done before the handshake is answered: nothing may be told yet."""

    async def run(self) -> None:
        """Until the connection has ended, or this is cancelled; has left all rooms then."""
        try:
            assert self._handshake is not None
            await self._begin(self._handshake)
            self._handshake = None
            while True:
                await self._take(await self._line.next_message())
        finally:
            self.end()

    def end(self) -> None:
        """Leave everything. `run` does it; to be called where `run` was not reached."""
        self._rooms.leave_all()
        if self.identity is not None:
            self._services.registry.forget(self)
            self._leave_behind(self.identity)

    def _leave_behind(self, identity: Identity) -> None:
        """What was read counts; who has gone types no more."""
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
    def line(self) -> Line:
        return self._line

    def close(self, code: Close, reason: str) -> None:
        self._line.close_soon(code, reason)

    def turn_away(self, error: ChatError) -> None:
        goodbye = goodbye_for(error)
        if isinstance(goodbye, Final):
            self._line.close_for_good(goodbye)
        else:
            self.close(goodbye, str(error))

    def subscription(self, conversation_id: int) -> Subscription | None:
        return self._rooms.get(conversation_id)

    # Taking commands.

    async def _take(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._line.close_for_good(Final.BINARY_FRAME)
            return
        if len(message.encode()) > self._config.limits.frame_bytes:  # the library counts characters
            self.close(Close.TOO_BIG, "this frame is too big")
            return
        try:
            command = protocol.decode_command(message)
        except NotJSON:
            self._line.close_for_good(Final.NO_JSON)
            return
        except protocol.CommandError as error:
            if self._limit_requests(error.ref):
                self._tell_error(error.error, error.ref)
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
        self._tell_error(RateLimited(retry_after=round(wait, 3)), ref)
        if self._requests.strike():
            self.close(Close.TOO_MANY_REQUESTS, "too many requests")

    async def _guard(self, work: Any, subject: Any, *rest: Any) -> None:
        """Errors become the reply; those that nobody foresaw end the connection, through its barrier."""
        try:
            await work(subject, *rest)
        except ChatError as error:
            self._tell_error(error, subject.ref)

    async def _handle(self, command: protocol.AnyCommand) -> None:
        match command:
            case protocol.Ping():
                self._push(event("pong", command.ref, server_time=now()))
            case protocol.Pong():
                self._line.answered()
            case protocol.Auth():
                await self._authenticate(command)
            case _ if self.identity is None:
                raise Unauthorized(message="authenticate first")
            case protocol.Refresh():
                await self._refresh(command, self.identity)
            case protocol.Subscribe():
                subscription = self._rooms.join(command.conversation_id, presence=bool(command.presence))
                await self._later(self._subscribe, command, subscription)
            case protocol.Unsubscribe():
                self._unsubscribe(command, self.identity)
            case protocol.History():
                await self._later(self._history, command, self.identity)
            case protocol.Send() | protocol.Edit() | protocol.Delete() | protocol.React():
                await self._write(command, self.identity)
            case protocol.Read() | protocol.Delivered():
                self._note_receipt(command, self.identity)
            case protocol.Typing():
                self._type(command, self.identity)

    async def _later(self, work: Any, command: protocol.Command, *rest: Any) -> None:
        """Go on reading while this waits; at most so many do."""
        await self._requests.slot()
        self._line.nursery.start_soon(self._release_after, work, command, *rest)

    async def _release_after(self, work: Any, command: protocol.Command, *rest: Any) -> None:
        try:
            await self._guard(work, command, *rest)
        finally:
            self._requests.free()

    # Authentication.

    async def _authenticate(self, command: protocol.Auth) -> None:
        first = self.identity is None
        try:
            await self._log_in(command)
            self._requests.charge_rooms(self._rooms.asked_by(command))
        except LOGIN_ERRORS as error:
            self._refuse_login(error, command.ref, first=first)

    async def _log_in(self, command: protocol.Auth) -> None:
        """One look at the database: whether the login counts, and where the rooms stand."""
        identity = await self._verify(command.token)
        try:
            await self._come_in(command, identity)
        except Outdated as outdated:
            await self._come_in(command, await self._chat.logins.renew(command.token, outdated))
        self._services.registry.appear(self)  # not before: a banned user is never online

    async def _come_in(self, command: protocol.Auth, identity: Identity) -> None:
        if self.identity is not None and self.identity.user_id != identity.user_id:
            raise Forbidden("this connection belongs to another user", field="token")
        await self._become(identity)
        ready = {"user_id": self.user_id, "session": self._line.name, "expires_in": _seconds_left(identity)}
        rooms = command.rooms or {}
        if rooms == "*":
            await self._rooms.enter_inbox(command.epoch, command.ref, **ready)
            return
        wanted = {id: protocol.position_of(rooms[id]) for id in self._rooms.fitting(rooms)}
        await self._rooms.enter_all(wanted, command.epoch, command.ref, **ready)
        if len(wanted) < len(rooms):
            self._line.nursery.start_soon(self._rooms.refuse, [id for id in rooms if id not in wanted])

    async def _verify(self, token: str) -> Identity:
        """Who is in already is no guesser, whatever others do at the same address."""
        if self.identity is not None:
            return await self._chat.logins.verify(token)
        # It has come in time; how long the answer takes is not the client's fault.
        self._line.close_at(math.inf, Close.NO_AUTH, "no auth in time")
        registry = self._services.registry
        failed_logins, guesser = registry.failed_logins, registry.guesser(self._address)
        try:
            async with failed_logins.turn(guesser):
                with self._line.our_turn():
                    identity = await self._chat.logins.verify(token)
            self._line.known()
            return identity
        except Unauthorized:
            if wait := failed_logins.failed(guesser):
                metrics.RATE_LIMITED.labels("logins").inc()
                raise RateLimited("too many failed logins from here", retry_after=round(wait, 3)) from None
            raise

    def _refuse_login(self, error: ChatError, ref: Any, *, first: bool) -> None:
        """Who is in already stays, when it is us who cannot tell whether the new token is as good."""
        self._tell_error(error, ref)
        refused(error, conn=self._line.name, remote=self._address)
        if first or not isinstance(error, Unavailable):
            self.turn_away(error)

    async def _register(self, user_id: int) -> None:
        """Raises TooManyConnections."""
        self.user_id, registry = user_id, self._services.registry
        while not registry.register(self):
            if not await end_most_silent(registry.guests_of(user_id)):
                raise TooManyConnections

    async def _become(self, identity: Identity) -> None:
        """Take on an identity, for the first time or refreshed. Raises TooManyConnections."""
        if self.identity is None:
            await self._register(identity.user_id)
            log.info("authenticated", conn=self._line.name, user_id=self.user_id, remote=self._address)
        self.identity = identity
        self._rooms.become(identity)
        # A token that the leeway has let in may have ended: its client has the same time to bring another.
        left = max(0.0, identity.expires_at - time.time()) + self._config.auth.expiry_grace
        self._line.close_at(trio.current_time() + left, Close.TOKEN_EXPIRED, "the token has expired")

    async def _refresh(self, command: protocol.Refresh, identity: Identity) -> None:
        try:
            fresh = await self._chat.logins.checked(command.token, await self._verify(command.token))
        except LOGIN_ERRORS as error:
            self._refuse_login(error, command.ref, first=False)
            return
        if fresh.user_id != identity.user_id:
            raise Forbidden("the new token is another user's", field="token")
        await self._become(fresh)
        self._ok(command.ref, expires_in=_seconds_left(fresh))

    # Being in rooms.

    def _unsubscribe(self, command: protocol.Unsubscribe, identity: Identity) -> None:
        self._rooms.leave(command.conversation_id)
        if command.conversation_id in self._typing:
            self._typing.discard(command.conversation_id)
            self._chat.typing.stop(command.conversation_id, identity.user_id)
        self._ok(command.ref)

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
        self._ok(command.ref)

    def _note_receipt(self, command: protocol.Read | protocol.Delivered, identity: Identity) -> None:
        if self._receipts is None:
            self._receipts = Receipts(self._chat, self._line.nursery, self._requests, self._tell_noted)
        self._receipts.note(command, identity)

    def _tell_noted(self, ref: Any, error: ChatError | None) -> None:
        if error is not None:
            self._tell_error(error, ref)
        else:
            self._ok(ref)

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
            await self._line.drained()  # of what rooms have brought meanwhile
            self._push(event("history", command.ref, messages=page.messages, has_more=page.has_more))

    # Writing.

    async def _write(self, command: Write, identity: Identity) -> None:
        if wait := self._services.registry.take_send(self.user_id):
            self._refuse_rate("sends", command.ref, wait)
            return
        rights = self._chat.conversations.rights(identity, command.conversation_id)
        wanted = to_store(command, identity, rights)
        if isinstance(wanted, Create):
            self._chat.messages.check_type(wanted.type)
        if isinstance(wanted, Create | Edit) and self._chat.before_message is not None:
            # Here, not in a task of its own: what a client sends and edits keeps its order.
            self._chat.messages.check(wanted)
            await self._chat.messages.check_allowed(wanted)
            wanted = await self._chat.before_message.check(wanted)
        await self._requests.slot()
        try:
            self._chat.messages.submit(wanted, partial(self._written, command.ref))
            self._requests.submitted()
        except BaseException:
            self._requests.free()
            raise

    def _written(self, ref: Any, outcomes: Sequence[Outcome]) -> None:
        """Called by the writer, also when this connection has ended meanwhile: nothing is sent then. Of the
        command it has the `ref` alone: the rest is large when it is decoded.
        """
        self._requests.free()
        self._requests.written()
        (outcome,) = outcomes
        match outcome:
            case ChatError():
                self._tell_error(outcome, ref)
            case Created(id, seq, created_at, client_id, duplicate):
                again = {"duplicate": True} if duplicate else {}
                self._ok(ref, id=id, seq=seq, created_at=created_at, client_id=client_id, **again)
            case Changed(id, seq):
                self._ok(ref, id=id, seq=seq)

    # Replying. Also once no event is sent any more: who sent a command wants to know what became of it.

    async def all_answered(self) -> None:
        """Until the writer has said what became of each command that it has been given."""
        await self._requests.all_written()

    def _ok(self, ref: Any, **fields: Any) -> None:
        if ref is not None:
            self._line.reply(text_frame(event("ok", ref, **fields)))

    def _tell_error(self, error: ChatError, ref: Any = None) -> None:
        self._line.reply(text_frame(protocol.error_event(error, ref)))

    def _push(self, payload: bytes) -> None:
        """An event of our own: a flat client gets none of them but errors."""
        if not self.flat:
            self._line.push(text_frame(payload))


def speaks_ours(handshake: Handshake) -> bool:
    return not handshake.subprotocols or protocol.SUBPROTOCOL in handshake.subprotocols


def _seconds_left(identity: Identity) -> int:
    return max(0, int(identity.expires_at - time.time()))
