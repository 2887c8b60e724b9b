"""The rooms of one session: enter, start over, leave. Implements `listeners.Listener`.

A subscription is registered before anything is read, so what is committed from then on is buffered or pushed;
then the snapshot is read and answered, and what was buffered follows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from chatd.core.errors import ChatError, Close, Final, LimitExceeded, NotFound, Unavailable
from chatd.core.model import Identity, Kind, Position
from chatd.core.protocol import Auth, event, text_frame
from chatd.hub.fanout.rooms import Membership, Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.replay import parts
from chatd.observe import metrics
from chatd.store.read.snapshots import Snapshot

SNAPSHOT_TRIES = 3  # for a room so busy that its buffer overflows while the snapshot is read
REFUSED_AT_ONCE = 100  # rooms that are too many, told without a look at whether the client reads
RETRY = 1.0  # seconds, while the database does not answer

Read = Callable[[Identity, int, Position, str | None], Awaitable[Snapshot]]


class Subscriptions:
    """`flat` listeners know nothing but messages: no answer is sent to them. `identity` is set at login."""

    __slots__ = (
        *("_behind", "_conversations", "_inbox", "_line", "_most", "_rooms", "_services"),
        *("flat", "identity", "offer", "push", "try_push", "user_id"),
    )

    def __init__(self, services: Services, line: Line, *, flat: bool) -> None:
        self._services, self._line, self.flat = services, line, flat
        # Nothing stands between a room and the line: these are called for each delivery.
        self.push, self.try_push, self.offer = line.push, line.try_push, line.offer
        self._conversations = services.chat.conversations
        self._most = services.settings.now.limits.rooms_per_connection
        self._rooms = Membership(services.rooms, services.audiences)
        self._inbox: Set[int] = frozenset()  # rooms that do not count against the most
        self._behind: deque[Subscription] | None = None  # None: nobody reads on for any
        self.identity: Identity | None = None
        self.user_id = 0

    def leave_all(self) -> None:
        self._rooms.leave_all()

    def become(self, identity: Identity) -> None:
        """Log in, or take a fresh token: rooms that it does not open any more are held against the database."""
        self.identity, self.user_id = identity, identity.user_id
        for subscription in self._rooms:
            still = self._conversations.entitled(identity, subscription.conversation_id)
            if subscription.entitled and not still:
                self._services.sweep.doubt(subscription.conversation_id)
            subscription.entitled = still

    # For the fanout: synchronous.

    def resync(self, subscription: Subscription) -> None:
        if subscription.buffering:
            subscription.doubted = True  # what is being read just now must be read again
        else:
            metrics.RESETS.labels("overflow").inc()
            subscription.wait()
            self._line.nursery.start_soon(self._start_over, subscription)

    def fall_behind(self, subscription: Subscription) -> None:
        if subscription.buffering:
            subscription.lost = True
            return
        metrics.BEHIND.inc()
        subscription.wait()
        if self._behind is None:
            self._behind = deque()
            self._line.nursery.start_soon(self._catch_up, self._behind)
        self._behind.append(subscription)

    def dropped(self, subscription: Subscription) -> None:
        self._rooms.leave(subscription.conversation_id)
        self._tell_unsubscribed(subscription.conversation_id, NotFound())
        if self.flat:
            self._line.close_for_good(Final.TAKEN_OUT)

    # For the session.

    def fitting(self, wanted: Iterable[int]) -> list[int]:
        """The first of these, as many as may be entered."""
        known = self._counted
        slots = self._most - len(known)
        fitting: list[int] = []
        for conversation_id in wanted:
            if conversation_id not in known and conversation_id not in self._inbox:
                if not slots:
                    continue
                slots -= 1
            fitting.append(conversation_id)
        return fitting

    async def refuse(self, wanted: Iterable[int]) -> None:
        """Tell of rooms that are too many, as the client takes it: they may be thousands."""
        for number, conversation_id in enumerate(wanted):
            if not number % REFUSED_AT_ONCE:
                await self._line.drained()
            if conversation_id not in self._rooms:  # the client has asked for it again meanwhile
                self._tell_unsubscribed(conversation_id, self._too_many())

    def _too_many(self) -> LimitExceeded:
        return LimitExceeded(f"at most {self._most} rooms on a connection", field="conversation_id")

    @property
    def _counted(self) -> set[int]:
        return {one.conversation_id for one in self._rooms} - self._inbox

    def join(self, conversation_id: int, *, presence: bool | None = None) -> Subscription:
        """Register; `enter` must follow. `presence`: tell who is online. Raises LimitExceeded."""
        known = conversation_id in self._rooms or conversation_id in self._inbox
        if not known and len(self._counted) >= self._most:
            raise self._too_many()
        assert self.identity is not None
        entitled = self._conversations.entitled(self.identity, conversation_id)
        subscription = self._rooms.join(conversation_id, self, entitled=entitled)
        if presence is not None:
            subscription.presence = presence
            if not presence:
                self._services.audiences.unwatch(subscription)
        return subscription

    def asked_by(self, command: Auth) -> int:
        """How many rooms this login, which was answered, has read."""
        return len(self._inbox) if command.rooms == "*" else len(command.rooms or ())

    def get(self, conversation_id: int) -> Subscription | None:
        return self._rooms.get(conversation_id)

    def has_entered(self, conversation_id: int) -> bool:
        subscription = self._rooms.get(conversation_id)
        return subscription is not None and subscription.entered

    def leave(self, conversation_id: int) -> None:
        self._rooms.leave(conversation_id)

    async def enter(self, subscription: Subscription, position: Position, epoch: str | None, ref: Any) -> None:
        """Read the snapshot and answer. Raises NotFound, or Unavailable: who was in the room stays in it."""
        async with self._line.unhurried():
            try:
                snapshot = await self._snapshot(subscription, position, epoch)
            except ChatError as error:
                self._not_entered(subscription, error)
                raise
            await self._replay(subscription, snapshot, position, ref)

    async def prepare(self, conversation_id: int) -> tuple[Subscription, Snapshot]:
        """Join a room whose listener gets no answer: what is committed from now on is kept for it.

        `begin` must follow. Raises as `enter` does.
        """
        subscription = self.join(conversation_id)
        try:
            return subscription, await self._snapshot(subscription, Position(), None)
        except ChatError as error:
            self._not_entered(subscription, error)
            raise

    def begin(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """Give it what was kept; it is live from now on."""
        if subscription.joined:
            self._settle(subscription, snapshot)

    async def enter_inbox(self, epoch: str | None, ref: Any, **ready: Any) -> None:
        """Enter all of the user's conversations, heads only. Others may be entered beside them."""
        assert self.identity is not None
        inbox = await self._conversations.inbox(self.identity)
        self._inbox = set(inbox)
        await self.enter_all(dict.fromkeys(inbox, Position()), epoch, ref, **ready)

    async def enter_all(
        self, wanted: Mapping[int, Position], epoch: str | None, ref: Any, **ready: Any
    ) -> None:
        """Enter several rooms in one snapshot and answer with `ready`; what may not be is told after."""
        assert self.identity is not None
        joined = {conversation_id: self.join(conversation_id) for conversation_id in wanted}
        async with self._line.unhurried():
            for subscription in joined.values():
                subscription.hold()
            try:
                found = await self._conversations.enter_all(self.identity, wanted, epoch)
                await self._line.drained()  # of what other rooms have brought meanwhile
            except ChatError as error:
                for subscription in joined.values():
                    self._not_entered(subscription, error)
                raise
            entered = {id: s for id, s in found.rooms.items() if isinstance(s, Snapshot) and joined[id].joined}
            rooms = {str(id): self._part_of_ready(joined[id], s, wanted[id]) for id, s in entered.items()}
            self._tell(event("ready", ref, **ready, epoch=found.epoch, rooms=rooms))
            for conversation_id, subscription in joined.items():
                if snapshot := entered.get(conversation_id):
                    self._begin_or_wait(subscription, snapshot, wanted[conversation_id])
                elif subscription.joined:
                    self.leave(conversation_id)
                    self._tell_unsubscribed(conversation_id, NotFound())
        if waiting := [joined[id] for id, snapshot in entered.items() if snapshot.later]:
            self._line.nursery.start_soon(self._follow, waiting)

    def _part_of_ready(
        self, subscription: Subscription, snapshot: Snapshot, position: Position
    ) -> dict[str, Any]:
        """A room whose changes come later stands where the client says that it stands."""
        answer = self._answer(subscription, snapshot)
        if snapshot.later:
            answer |= {"seq": position.after, "mark": position.mark or None}
        return answer

    def _begin_or_wait(self, subscription: Subscription, snapshot: Snapshot, position: Position) -> None:
        if snapshot.later:
            subscription.wait_at(position, snapshot.epoch)
        else:
            self._count(snapshot, position)
            self._settle(subscription, snapshot)

    async def _follow(self, waiting: Iterable[Subscription]) -> None:
        """What did not fit into a `ready`: one room after the other, as the client takes it."""
        for subscription in waiting:
            await self._start_over(subscription)

    # Snapshots.

    async def _snapshot(self, subscription: Subscription, position: Position, epoch: str | None) -> Snapshot:
        """Buffer, then read; again if that does not fit together."""
        for _ in range(SNAPSHOT_TRIES):
            snapshot = await self._read(self._conversations.enter, subscription, position, epoch)
            if subscription.fits(snapshot.seq, snapshot.members_version):
                return snapshot
        raise Unavailable("this room is too busy to enter just now")

    async def _read(
        self, read: Read, subscription: Subscription, position: Position, epoch: str | None
    ) -> Snapshot:
        assert self.identity is not None
        subscription.hold()
        snapshot = await read(self.identity, subscription.conversation_id, position, epoch)
        if subscription.presence and subscription.joined:  # not before: only now the rights are known
            await self._services.audiences.watch(subscription)
        if not subscription.joined:
            raise NotFound("this subscription was ended meanwhile", field="conversation_id")
        return snapshot

    def _not_entered(self, subscription: Subscription, error: ChatError) -> None:
        """Who was live before goes on as if nothing had been asked: nobody has told the client otherwise."""
        if not subscription.joined:
            return
        if not subscription.entered or isinstance(error, NotFound):
            self.leave(subscription.conversation_id)
            return
        subscription.settle(subscription.cursor, subscription.mark)
        room = subscription.room
        if (subscription.cursor, subscription.mark) != (room.head, room.mark):  # something was let go of
            self.resync(subscription)

    async def _start_over(self, subscription: Subscription) -> None:
        """The server's own wish: the subscription is buffering, and stays so until it is read anew."""
        while subscription.joined and subscription.buffering:
            try:
                await self._read_anew(subscription)
            except Unavailable:
                await trio.sleep(RETRY)
            except NotFound:
                if subscription.joined:
                    self.dropped(subscription)

    async def _read_anew(self, subscription: Subscription) -> None:
        async with self._line.unhurried():
            if not subscription.buffering:
                return  # the client has asked meanwhile
            position = Position(subscription.cursor, subscription.mark)
            snapshot = await self._snapshot(subscription, position, subscription.epoch)
            await self._replay(subscription, snapshot, position)

    async def _catch_up(self, behind: deque[Subscription]) -> None:
        """Each in its turn gets a portion of what it has missed, until all of them are live again."""
        while behind:
            subscription = behind.popleft()
            try:
                if not await self._read_on(subscription):
                    behind.append(subscription)
            except Unavailable:
                subscription.wait()
                behind.append(subscription)
                await trio.sleep(RETRY)
            except NotFound:
                if subscription.joined:
                    self.dropped(subscription)
        self._behind = None

    async def _read_on(self, subscription: Subscription) -> bool:
        """False where there is more to be read."""
        async with self._line.unhurried():
            if not (subscription.joined and subscription.buffering):
                return True  # the client has left, or has asked meanwhile
            position, epoch = Position(subscription.cursor, subscription.mark), subscription.epoch
            snapshot = await self._read(self._conversations.read_on, subscription, position, epoch)
            self._count_told(snapshot)
            if snapshot.later:  # first: while the client takes this portion, nothing is kept of what follows it
                subscription.wait_at(Position(snapshot.seq, snapshot.mark), snapshot.epoch)
            await self._tell_missed(subscription, snapshot)
            if not snapshot.later:
                self._settle(subscription, snapshot)
            return not snapshot.later

    async def _replay(
        self, subscription: Subscription, snapshot: Snapshot, position: Position, ref: Any = None
    ) -> None:
        """Answer with what was missed; live from then on."""
        self._count(snapshot, position)
        await self._tell_missed(subscription, snapshot, ref)
        self._settle(subscription, snapshot)

    async def _tell_missed(self, subscription: Subscription, snapshot: Snapshot, ref: Any = None) -> None:
        """In pieces: each when the client has taken most of the one before."""
        if self.flat:
            self._tell_flat(snapshot)
            return
        for number, part in enumerate(parts(snapshot, self._around(subscription, snapshot))):
            await self._line.drained()
            if not subscription.joined:
                return
            self._tell(event("subscribed", None if number else ref, **self._answer(subscription, part)))

    def _tell_flat(self, snapshot: Snapshot) -> None:
        """A flat client knows no answers: it gets the messages themselves, or has to come again."""
        if snapshot.recovered:
            created = [text_frame(one.payload) for one in snapshot.changes if one.kind is Kind.CREATED]
            self.push(b"".join(created))
        else:
            self._line.close_soon(Close.OVERLOADED, "too much was missed")

    def _settle(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """After the answer: what was buffered and is newer; live from then on."""
        if not subscription.joined:
            return
        complete = subscription.fits(snapshot.seq, snapshot.members_version)
        version = snapshot.members_version
        subscription.settle(snapshot.seq, snapshot.mark, version)
        room, fanout = subscription.room, self._services.fanout
        fanout.opened(room, snapshot.seq, snapshot.mark, version)
        if not complete:
            self.fall_behind(subscription)
        elif not subscription.buffering and subscription.cursor < (room.head or 0):
            # All that was pushed meanwhile has been buffered.
            self._services.queue.doubt_history(room)

    @staticmethod
    def _count(snapshot: Snapshot, position: Position) -> None:
        """How a resume went, if it was one."""
        if position.after is None:
            return
        metrics.RECOVERIES.labels(str(snapshot.recovered).lower()).inc()
        Subscriptions._count_told(snapshot)

    @staticmethod
    def _count_told(snapshot: Snapshot) -> None:
        metrics.DELIVERED_REPLAY.inc(len(snapshot.changes))
        if not snapshot.recovered:
            metrics.RESETS.labels("missed_too_much" if snapshot.same else "other_history").inc()

    # Telling.

    def _around(self, subscription: Subscription, snapshot: Snapshot) -> int:
        """Bytes of an answer without its changes, if there are any."""
        if not snapshot.changes:
            return 0
        return len(event("subscribed", 2**53, **self._answer(subscription, replace(snapshot, changes=()))))

    def _answer(self, subscription: Subscription, snapshot: Snapshot) -> dict[str, Any]:
        audiences = self._services.audiences
        audiences.visit(subscription, member=snapshot.member)
        online = audiences.online(snapshot.conversation_id) if subscription.presence else {}
        return {
            "conversation_id": snapshot.conversation_id,
            "epoch": snapshot.epoch,
            "seq": snapshot.seq,
            "mark": snapshot.mark,
            "recovered": snapshot.recovered,
            "changes": [msgspec.Raw(change.payload) for change in snapshot.changes],
            "has_more": snapshot.has_more,
            "unread": snapshot.unread,
            "receipts": snapshot.receipts,
        } | online

    def _tell_unsubscribed(self, conversation_id: int, error: ChatError) -> None:
        self._tell(event("unsubscribed", conversation_id=conversation_id, code=error.code, message=str(error)))

    def _tell(self, payload: bytes) -> None:
        if not self.flat:
            self._line.push(text_frame(payload))
