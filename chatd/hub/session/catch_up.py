"""Brings the subscriptions of one session to the heads of their rooms. Implements `listeners.Listener`.

A subscription is registered before its snapshot is read, so that changes committed from then on are buffered.
Then the snapshot is read and sent, and the buffer is sent after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from chatd.core.errors import ChatError, Close, Final, NotFound, Unavailable
from chatd.core.model import Identity, Kind, Position
from chatd.core.protocol import event, text_frame
from chatd.hub.fanout.rooms import Membership
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.replay import parts
from chatd.observe import metrics
from chatd.store.read.snapshots import Snapshot

SNAPSHOT_TRIES = 3  # attempts, if a room is so busy that the buffer overflows while the snapshot is read
RETRY = 1.0  # seconds between attempts while the database does not answer

Read = Callable[[Identity, int, Position, str | None], Awaitable[Snapshot]]


class CatchUp:
    """`flat` listeners get only messages and no answers. `identity` is set at login."""

    __slots__ = (
        *("_behind", "_conversations", "_line", "_rooms", "_services"),
        *("flat", "identity", "offer", "push", "try_push", "user_id"),
    )

    def __init__(self, services: Services, line: Line, rooms: Membership, *, flat: bool) -> None:
        self._services, self._line, self._rooms, self.flat = services, line, rooms, flat
        # These are called for each delivery: binding them here saves a call each time.
        self.push, self.try_push, self.offer = line.push, line.try_push, line.offer
        self._conversations = services.chat.conversations
        self._behind: deque[Subscription] | None = None  # subscriptions to catch up; None: no task does so
        self.identity: Identity | None = None
        self.user_id = 0

    def become(self, identity: Identity) -> None:
        self.identity, self.user_id = identity, identity.user_id

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
        self.send_unsubscribed(subscription.conversation_id, NotFound())
        if self.flat:
            self._line.close_for_good(Final.TAKEN_OUT)

    # Reading.

    async def snapshot(self, subscription: Subscription, position: Position, epoch: str | None) -> Snapshot:
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

    def undo(self, subscription: Subscription, error: ChatError) -> None:
        """Undo a failed `enter`. A subscription that was live before continues, unless the user may not be in
        the room.
        """
        if not subscription.joined:
            return
        if not subscription.entered or isinstance(error, NotFound):
            self._rooms.leave(subscription.conversation_id)
            return
        subscription.settle(subscription.cursor, subscription.mark)
        room = subscription.room
        if (subscription.cursor, subscription.mark) != (room.head, room.mark):  # it has missed changes
            self.resync(subscription)

    async def replay(
        self, subscription: Subscription, snapshot: Snapshot, position: Position, ref: Any = None
    ) -> None:
        """Send the missed changes. The subscription is live afterwards."""
        self.count(snapshot, position)
        await self._send_missed(subscription, snapshot, ref)
        self.settle(subscription, snapshot)

    def settle(self, subscription: Subscription, snapshot: Snapshot) -> None:
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

    async def follow(self, waiting: Iterable[Subscription]) -> None:
        """Send the rooms that did not fit into `ready`, one by one, at the speed at which the client reads."""
        for subscription in waiting:
            await self._start_over(subscription)

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
            snapshot = await self.snapshot(subscription, position, subscription.epoch)
            await self.replay(subscription, snapshot, position)

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
                self.settle(subscription, snapshot)
            return not snapshot.later

    # Sending.

    async def _send_missed(self, subscription: Subscription, snapshot: Snapshot, ref: Any = None) -> None:
        """Send the missed changes in parts, each when the client has read most of the one before."""
        if self.flat:
            self._send_flat(snapshot)
            return
        for number, part in enumerate(parts(snapshot, self._overhead(subscription, snapshot))):
            await self._line.drained()
            if not subscription.joined:
                return
            self.send(event("subscribed", None if number else ref, **self.answer(subscription, part)))

    def _send_flat(self, snapshot: Snapshot) -> None:
        """Send a flat client the missed messages. If too many were missed, close it so that it reconnects."""
        if snapshot.recovered:
            created = [text_frame(one.payload) for one in snapshot.changes if one.kind is Kind.CREATED]
            self.push(b"".join(created))
        else:
            self._line.close_soon(Close.OVERLOADED, "too much was missed")

    def answer(self, subscription: Subscription, snapshot: Snapshot) -> dict[str, Any]:
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

    def _overhead(self, subscription: Subscription, snapshot: Snapshot) -> int:
        """Return the bytes of an answer without its changes; 0 if it has no changes."""
        if not snapshot.changes:
            return 0
        return len(event("subscribed", 2**53, **self.answer(subscription, replace(snapshot, changes=()))))

    def send_unsubscribed(self, conversation_id: int, error: ChatError) -> None:
        self.send(event("unsubscribed", conversation_id=conversation_id, code=error.code, message=str(error)))

    def send(self, payload: bytes) -> None:
        if not self.flat:
            self._line.push(text_frame(payload))

    @staticmethod
    def count(snapshot: Snapshot, position: Position) -> None:
        """Count whether a resume has recovered all changes. A subscribe without a position is not counted."""
        if position.after is None:
            return
        metrics.RECOVERIES.labels(str(snapshot.recovered).lower()).inc()
        CatchUp._count_sent(snapshot)

    @staticmethod
    def _count_sent(snapshot: Snapshot) -> None:
        metrics.DELIVERED_REPLAY.inc(len(snapshot.changes))
        if not snapshot.recovered:
            metrics.RESETS.labels("missed_too_much" if snapshot.same else "other_history").inc()
