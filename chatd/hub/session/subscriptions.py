"""The subscriptions of one session: it enters rooms, by a command or at login, and leaves them.

`CatchUp` brings each subscription to the head of its room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from chatd.core.errors import ChatError, LimitExceeded, NotFound
from chatd.core.model import Identity, Position
from chatd.core.protocol import Auth, event
from chatd.hub.fanout.rooms import Membership
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.catch_up import CatchUp
from chatd.store.read.snapshots import Snapshot

REFUSED_AT_ONCE = 100  # rooms over the limit that are reported before the server waits for a slow consumer


class Subscriptions:
    """One session's rooms. A `flat` session gets only messages and no answers."""

    __slots__ = ("_catch_up", "_conversations", "_inbox", "_line", "_most", "_rooms", "_services")

    def __init__(self, services: Services, line: Line, *, flat: bool) -> None:
        self._services, self._line = services, line
        self._conversations = services.chat.conversations
        self._most = services.settings.now.limits.rooms_per_connection
        self._rooms = Membership(services.rooms, services.audiences)
        self._inbox: Set[int] = frozenset()  # rooms of `rooms: "*"`, which do not count against the limit
        self._catch_up = CatchUp(services, line, self._rooms, flat=flat)

    @property
    def identity(self) -> Identity | None:
        """None before the login."""
        return self._catch_up.identity

    def leave_all(self) -> None:
        self._rooms.leave_all()

    def become(self, identity: Identity) -> None:
        """Take the identity of a login or of a new token. If a room's entitlement is gone with the old token,
        the sweep checks the room's rights.
        """
        self._catch_up.become(identity)
        for subscription in self._rooms:
            still = self._conversations.entitled(identity, subscription.conversation_id)
            if subscription.entitled and not still:
                self._services.sweep.doubt(subscription.conversation_id)
            subscription.entitled = still

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
                self._catch_up.send_unsubscribed(conversation_id, self._too_many())

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
        subscription = self._rooms.join(conversation_id, self._catch_up, entitled=entitled)
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
                snapshot = await self._catch_up.snapshot(subscription, position, epoch)
            except ChatError as error:
                self._catch_up.undo(subscription, error)
                raise
            await self._catch_up.replay(subscription, snapshot, position, ref)

    async def prepare(self, conversation_id: int) -> tuple[Subscription, Snapshot]:
        """Join a room for a flat listener, which gets no answer. Changes from now on are buffered for it.

        The caller must call `begin` next. Raises the same errors as `enter`.
        """
        subscription = self.join(conversation_id)
        try:
            return subscription, await self._catch_up.snapshot(subscription, Position(), None)
        except ChatError as error:
            self._catch_up.undo(subscription, error)
            raise

    def begin(self, subscription: Subscription, snapshot: Snapshot) -> None:
        """Push the buffer. The subscription is live from now on."""
        if subscription.joined:
            self._catch_up.settle(subscription, snapshot)

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
                    self._catch_up.undo(subscription, error)
                raise
            entered = {id: s for id, s in found.rooms.items() if isinstance(s, Snapshot) and joined[id].joined}
            rooms = {str(id): self._part_of_ready(joined[id], s, wanted[id]) for id, s in entered.items()}
            self._catch_up.send(event("ready", ref, **ready, epoch=found.epoch, rooms=rooms))
            for conversation_id, subscription in joined.items():
                if snapshot := entered.get(conversation_id):
                    self._begin_or_wait(subscription, snapshot, wanted[conversation_id])
                elif subscription.joined:
                    self.leave(conversation_id)
                    self._catch_up.send_unsubscribed(conversation_id, NotFound())
        if waiting := [joined[id] for id, snapshot in entered.items() if snapshot.later]:
            self._line.nursery.start_soon(self._catch_up.follow, waiting)

    def _part_of_ready(
        self, subscription: Subscription, snapshot: Snapshot, position: Position
    ) -> dict[str, Any]:
        """A room whose changes are sent later keeps the position that the client has sent."""
        answer = self._catch_up.answer(subscription, snapshot)
        if snapshot.later:
            answer |= {"seq": position.after, "mark": position.mark or None}
        return answer

    def _begin_or_wait(self, subscription: Subscription, snapshot: Snapshot, position: Position) -> None:
        if snapshot.later:
            subscription.wait_at(position, snapshot.epoch)
        else:
            self._catch_up.count(snapshot, position)
            self._catch_up.settle(subscription, snapshot)
