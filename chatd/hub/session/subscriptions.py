"""The subscriptions of one session: it enters rooms, reads them again, and leaves them. Implements
`listeners.Listener`.

A subscription is registered before its snapshot is read, so that changes committed from then on are buffered.
Then the snapshot is read and sent, and the buffer is sent after it.
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

SNAPSHOT_TRIES = 3  # attempts, if a room is so busy that the buffer overflows while the snapshot is read
REFUSED_AT_ONCE = 100  # rooms over the limit that are reported before the server waits for a slow consumer
RETRY = 1.0  # seconds between attempts while the database does not answer

Read = Callable[[Identity, int, Position, str | None], Awaitable[Snapshot]]


class Subscriptions:
    """One session's rooms. `flat` listeners get only messages and no answers. `identity` is set at login."""

    __slots__ = (
        *("_behind", "_conversations", "_inbox", "_line", "_most", "_rooms", "_services"),
        *("flat", "identity", "offer", "push", "try_push", "user_id"),
    )

    def __init__(self, services: Services, line: Line, *, flat: bool) -> None:
        self._services, self._line, self.flat = services, line, flat
        # These are called for each delivery: binding them here saves a call each time.
        self.push, self.try_push, self.offer = line.push, line.try_push, line.offer
        self._conversations = services.chat.conversations
        self._most = services.settings.now.limits.rooms_per_connection
        self._rooms = Membership(services.rooms, services.audiences)
        self._inbox: Set[int] = frozenset()  # rooms of `rooms: "*"`, which do not count against the limit
        self._behind: deque[Subscription] | None = None  # subscriptions to catch up; None: no task does so
        self.identity: Identity | None = None
        self.user_id = 0

    def leave_all(self) -> None:
        self._rooms.leave_all()

    def become(self, identity: Identity) -> None:
        """Take the identity of a login or of a new token. If a room's entitlement is gone with the old token,
        the sweep checks the room's rights.
        """
        self.identity, self.user_id = identity, identity.user_id
        for subscription in self._rooms:
            still = self._conversations.entitled(identity, subscription.conversation_id)
            if subscription.entitled and not still:
                self._services.sweep.doubt(subscription.conversation_id)
            subscription.entitled = still

    # For the fanout: synchronous.

    def resync(self, subscription: Subscription) -> None:
        if subscription.buffering:
            subscription.doubted = True  # the snapshot that is being read must be read again
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
        """Return the first of `wanted`, up to the limit of rooms."""
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
        """Report each room over the limit, at the speed at which the client reads: they may be thousands."""
        for number, conversation_id in enumerate(wanted):
            if not number % REFUSED_AT_ONCE:
                await self._line.drained()
            if conversation_id not in self._rooms:  # else the client has subscribed to it meanwhile
                self._tell_unsubscribed(conversation_id, self._too_many())

    def _too_many(self) -> LimitExceeded:
        return LimitExceeded(f"at most {self._most} rooms on a connection", field="conversation_id")

    @property
    def _counted(self) -> set[int]:
        return {one.conversation_id for one in self._rooms} - self._inbox

    def join(self, conversation_id: int, *, presence: bool | None = None) -> Subscription:
        """Register a subscription; the caller must call `enter` next. `presence`: whether the client wants to
        know who is online; None: as before. Raises LimitExceeded.
        """
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
        """Return how many rooms this login, which has succeeded, has read."""
        return len(self._inbox) if command.rooms == "*" else len(command.rooms or ())

    def get(self, conversation_id: int) -> Subscription | None:
        return self._rooms.get(conversation_id)

    def has_entered(self, conversation_id: int) -> bool:
        subscription = self._rooms.get(conversation_id)
        return subscription is not None and subscription.entered

    def leave(self, conversation_id: int) -> None:
        self._rooms.leave(conversation_id)

    async def enter(self, subscription: Subscription, position: Position, epoch: str | None, ref: Any) -> None:
        """Read the snapshot and send it. Raises NotFound. Raises Unavailable too; a client that was already in
        the room stays in it then.
        """
        async with self._line.unhurried():
            try:
                snapshot = await self._snapshot(subscription, position, epoch)
            except ChatError as error:
                self._not_entered(subscription, error)
                raise
            await self._replay(subscription, snapshot, position, ref)

    async def prepare(self, conversation_id: int) -> tuple[Subscription, Snapshot]:
        """Join a room for a flat listener, which gets no answer. Changes from now on are buffered for it.

        The caller must call `begin` next. Raises the same errors as `enter`.
        """
        subscription = self.join(conversation_id)
        try:
            return subscription, await self._snapshot(subscription, Position(), None)
        except ChatError as error:
            self._not_entered(subscription, error)
            raise

    def begin(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """Push the buffer. The subscription is live from now on."""
        if subscription.joined:
            self._settle(subscription, snapshot)

    async def enter_inbox(self, epoch: str | None, ref: Any, **ready: Any) -> None:
        """Enter all of the user's conversations, and send their heads but no messages. The client may enter
        other rooms in addition.
        """
        assert self.identity is not None
        inbox = await self._conversations.inbox(self.identity)
        self._inbox = set(inbox)
        await self.enter_all(dict.fromkeys(inbox, Position()), epoch, ref, **ready)

    async def enter_all(
        self, wanted: Mapping[int, Position], epoch: str | None, ref: Any, **ready: Any
    ) -> None:
        """Enter several rooms with one read of the database, and send `ready`. After it an `unsubscribed` is
        sent for each room that the user may not enter.
        """
        assert self.identity is not None
        joined = {conversation_id: self.join(conversation_id) for conversation_id in wanted}
        async with self._line.unhurried():
            for subscription in joined.values():
                subscription.hold()
            try:
                found = await self._conversations.enter_all(self.identity, wanted, epoch)
                await self._line.drained()  # other rooms may have pushed messages meanwhile
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
        """A room whose changes are sent later keeps the position that the client has sent."""
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
        """Send the rooms that did not fit into `ready`, one by one, at the speed at which the client reads."""
        for subscription in waiting:
            await self._start_over(subscription)

    # Snapshots.

    async def _snapshot(self, subscription: Subscription, position: Position, epoch: str | None) -> Snapshot:
        """Start buffering, then read the snapshot. Try again if the buffer does not continue the snapshot."""
        for _ in range(SNAPSHOT_TRIES):
            snapshot = await self._read(self._conversations.enter, subscription, position, epoch)
            if subscription.fits(snapshot.seq, snapshot.members_version):
                return snapshot
        raise Unavailable("this room is too busy to be entered at the moment")

    async def _read(
        self, read: Read, subscription: Subscription, position: Position, epoch: str | None
    ) -> Snapshot:
        assert self.identity is not None
        subscription.hold()
        snapshot = await read(self.identity, subscription.conversation_id, position, epoch)
        if subscription.presence and subscription.joined:  # after the read, which has checked the rights
            await self._services.audiences.watch(subscription)
        if not subscription.joined:
            raise NotFound("this subscription was ended meanwhile", field="conversation_id")
        return snapshot

    def _not_entered(self, subscription: Subscription, error: ChatError) -> None:
        """Undo a failed `enter`. A subscription that was live before continues, unless the user may not be in
        the room.
        """
        if not subscription.joined:
            return
        if not subscription.entered or isinstance(error, NotFound):
            self.leave(subscription.conversation_id)
            return
        subscription.settle(subscription.cursor, subscription.mark)
        room = subscription.room
        if (subscription.cursor, subscription.mark) != (room.head, room.mark):  # it has missed changes
            self.resync(subscription)

    async def _start_over(self, subscription: Subscription) -> None:
        """Read a room again, without a request of the client, until the subscription is live."""
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
                return  # the client has subscribed again meanwhile
            position = Position(subscription.cursor, subscription.mark)
            snapshot = await self._snapshot(subscription, position, subscription.epoch)
            await self._replay(subscription, snapshot, position)

    async def _catch_up(self, behind: deque[Subscription]) -> None:
        """Send each subscription in turn a portion of the changes that it has missed, until all are live."""
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
        """Read and send one portion. Returns False if there is more to read."""
        async with self._line.unhurried():
            if not (subscription.joined and subscription.buffering):
                return True  # the client has left the room, or subscribed again, meanwhile
            position, epoch = Position(subscription.cursor, subscription.mark), subscription.epoch
            snapshot = await self._read(self._conversations.read_on, subscription, position, epoch)
            self._count_sent(snapshot)
            if snapshot.later:  # before it is sent: the changes after it are read later, so do not buffer them
                subscription.wait_at(Position(snapshot.seq, snapshot.mark), snapshot.epoch)
            await self._send_missed(subscription, snapshot)
            if not snapshot.later:
                self._settle(subscription, snapshot)
            return not snapshot.later

    async def _replay(
        self, subscription: Subscription, snapshot: Snapshot, position: Position, ref: Any = None
    ) -> None:
        """Send the missed changes. The subscription is live afterwards."""
        self._count(snapshot, position)
        await self._send_missed(subscription, snapshot, ref)
        self._settle(subscription, snapshot)

    async def _send_missed(self, subscription: Subscription, snapshot: Snapshot, ref: Any = None) -> None:
        """Send the missed changes in parts, each when the client has read most of the one before."""
        if self.flat:
            self._tell_flat(snapshot)
            return
        for number, part in enumerate(parts(snapshot, self._overhead(subscription, snapshot))):
            await self._line.drained()
            if not subscription.joined:
                return
            self._tell(event("subscribed", None if number else ref, **self._answer(subscription, part)))

    def _tell_flat(self, snapshot: Snapshot) -> None:
        """Send a flat client the missed messages. If too many were missed, close it so that it reconnects."""
        if snapshot.recovered:
            created = [text_frame(one.payload) for one in snapshot.changes if one.kind is Kind.CREATED]
            self.push(b"".join(created))
        else:
            self._line.close_soon(Close.OVERLOADED, "too much was missed")

    def _settle(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """After the answer, push the newer changes of the buffer. The subscription is live afterwards."""
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
            # All changes pushed meanwhile were buffered, so the room's history contradicts the snapshot's.
            self._services.queue.doubt_history(room)

    @staticmethod
    def _count(snapshot: Snapshot, position: Position) -> None:
        """Count whether a resume has recovered all changes. A subscribe without a position is not counted."""
        if position.after is None:
            return
        metrics.RECOVERIES.labels(str(snapshot.recovered).lower()).inc()
        Subscriptions._count_sent(snapshot)

    @staticmethod
    def _count_sent(snapshot: Snapshot) -> None:
        metrics.DELIVERED_REPLAY.inc(len(snapshot.changes))
        if not snapshot.recovered:
            metrics.RESETS.labels("missed_too_much" if snapshot.same else "other_history").inc()

    # Sending.

    def _overhead(self, subscription: Subscription, snapshot: Snapshot) -> int:
        """Return the bytes of an answer without its changes; 0 if it has no changes."""
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
