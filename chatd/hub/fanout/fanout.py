"""The fanout: one task that advances the heads of rooms and pushes new changes to their subscriptions.

Its only input is the queue, into which the bus puts changes and signals. When changes are missing in a room,
the fanout waits a moment for them to arrive, then has them read from the database. What was read comes back
through the same queue, so that no other task ever pushes a change. The sweep finds changes that no node has
published.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog
import trio

from chatd.core.errors import Unavailable
from chatd.core.model import Change, MemberChange, State
from chatd.core.protocol import event, text_frame
from chatd.hub.fanout.chunks import Chunk, chunks
from chatd.hub.fanout.queue import Announcement, Checked, FanoutQueue, HeadKnown, Item
from chatd.hub.fanout.repair import RETRY, Repaired, Repairs, StartOver
from chatd.hub.fanout.rooms import Room, Rooms
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.fanout.sweep import check_rights
from chatd.observe import metrics
from chatd.store.read import lookups
from chatd.store.read.reader import Reader

YIELD_EVERY = 200  # pushes between checkpoints: they take 1 ms
HOLE_WAIT = 0.02  # seconds that missing changes may take to arrive: two nodes' publications overtake each other

log = structlog.get_logger()


# Given user ids and a conversation's id, returns these users' subscriptions to the conversation.
Addressed = Callable[[Iterable[int], int], Iterable[Subscription]]


class Fanout:
    """Delivers what is in the queue, room by room."""

    def __init__(self, rooms: Rooms, queue: FanoutQueue, read: Reader, addressed: Addressed) -> None:
        self._rooms, self._queue, self._read, self._addressed = rooms, queue, read, addressed
        self._up = True
        self._nursery: trio.Nursery
        self._repairs = Repairs(rooms, read, queue.put)

    def links(self, up: bool) -> None:
        """Whether the bus delivers other nodes' changes at present."""
        self._up = up

    def fallen_behind(self, room: Room) -> None:
        """The room's head differs from the database's: repair it."""
        self._repairs.fallen_behind(room)

    def opened(self, room: Room, head: int, mark: str | None, members_version: int) -> None:
        """A session has read a snapshot of this room, which it has joined."""
        room.open(head, mark, members_version)
        if room.behind or room.in_doubt:
            self._queue.put(HeadKnown(room))

    # The one task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._repairs.run)
            task_status.started()
            while True:
                items, oldest = await self._queue.take()
                began = trio.current_time()
                await self._handle(items)
                self._observe(began, oldest)

    @staticmethod
    def _observe(began: float, oldest: float) -> None:
        now = trio.current_time()
        metrics.FANOUT_SECONDS.observe(now - began)
        if oldest < math.inf:
            metrics.DELIVERY_LAG.observe(now - oldest)

    async def _handle(self, items: deque[Item]) -> None:
        """Handle a batch. Its changes of one room are pushed together, up to the next item of another kind."""
        gathered: dict[int, list[Change]] = {}
        for item in items:
            self._queue.release(item)
            if isinstance(item, Change):
                gathered.setdefault(item.conversation_id, []).append(item)
                continue
            await self._advance_all(gathered)
            gathered = {}
            match item:
                case MemberChange():
                    await self._tell_members(item)
                case Announcement():
                    await self._announce(item)
                case Repaired(room, changes, early):
                    await self._repaired(room, changes, early)
                case Checked(room, seqs):
                    room.checking = False
                    room.clear_doubt(seqs)
                    await self._advance(room, [])
                case StartOver(room, found, anew):
                    await self._start_over(room, found, anew=anew)
                case HeadKnown(room):
                    await self._advance(room, [])
        await self._advance_all(gathered)

    async def _advance_all(self, gathered: dict[int, list[Change]]) -> None:
        for conversation_id, changes in gathered.items():
            if room := self._rooms.get(conversation_id):
                await self._advance(room, changes)
        await trio.lowlevel.checkpoint()

    async def _advance(self, room: Room, changes: Sequence[Change]) -> None:
        for chunk in chunks(room.accept(changes)):
            await self._push(room, chunk)
        if room.in_doubt:
            self._check_soon(room)
        elif room.behind:
            self._repairs.soon(room, HOLE_WAIT if self._up and not room.stale else 0)

    async def _push(self, room: Room, chunk: Chunk) -> None:
        delivered = await self._to_all(room, lambda subscription: subscription.deliver(chunk))
        metrics.DELIVERED_LIVE.inc(delivered * (chunk.last - chunk.first + 1))

    async def _to_all(self, room: Room, act: Callable[[Subscription], object]) -> int:
        return await self._to_each(list(room.subscriptions), act)

    @staticmethod
    async def _to_each(subscriptions: list[Subscription], act: Callable[[Subscription], object]) -> int:
        """Call `act` for each subscription; return for how many it was true. A subscription that ends
        meanwhile ignores the call.
        """
        yes = 0
        for count, subscription in enumerate(subscriptions, 1):
            if act(subscription):
                yes += 1
            if count % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        return yes

    async def _announce(self, item: Announcement) -> None:
        def announce(subscription: Subscription) -> None:
            listener = subscription.listener
            if (
                (listener.flat and not item.flat)
                or listener.user_id == item.besides
                or (item.watchers and not subscription.presence)
            ):
                return
            if item.ephemeral:
                told = subscription.offer(item.frame, lasting=item.lasting)
                if item.watchers and not told:
                    subscription.presence_missed = True  # the sweep sends it a new answer
            else:
                subscription.announce(item.frame)

        if item.to is not None:
            # Do not scan the room: each member's own receipts would cost the square of its size.
            await self._to_each(list(self._addressed(item.to, item.conversation_id)), announce)
        elif room := self._rooms.get(item.conversation_id):
            await self._to_all(room, announce)

    async def _tell_members(self, change: MemberChange) -> None:
        room = self._rooms.get(change.conversation_id)
        if room is None:
            return
        # If the rights of all subscriptions were checked at this version or a later one, a user who has come
        # back since the removal stays.
        known = room.members_version is not None and change.version <= room.members_version
        if change.version == (room.members_version or 0) + 1:
            room.members_version = change.version
        active = change.state is State.ACTIVE
        if not active:
            for subscription in list(room.subscriptions):
                if subscription.listener.user_id != change.user_id:
                    continue
                if not known:
                    subscription.listener.dropped(subscription)
                else:  # a snapshot that is being read may be older than this removal
                    subscription.distrust()
        if change.quiet:
            return
        fields = {"role": change.role} if active and change.role else {}
        payload = event(
            "member",
            conversation_id=change.conversation_id,
            user_id=change.user_id,
            change="added" if active else "removed",
            **fields,
        )
        await self._announce(Announcement(change.conversation_id, text_frame(payload), flat=False))

    # Doubt: a user was removed, but the signal for it has not arrived. This room waits until its rights are
    # read from the database; the other rooms go on.

    def _check_soon(self, room: Room) -> None:
        if not room.checking:
            room.checking = True
            self._nursery.start_soon(self._check, room)

    async def _check(self, room: Room) -> None:
        while room.in_doubt and self._rooms.get(room.conversation_id) is room:
            seqs = set(room.ahead)
            try:
                await check_rights(self._read, room)
            except Unavailable:
                await trio.sleep(RETRY)
            else:
                self._queue.put(Checked(room, seqs))
                return
        room.checking = False

    # Repair: `repair` reads the database, and its result comes back through the queue.

    async def _repaired(self, room: Room, changes: list[Change], early: set[int]) -> None:
        room.repairing = False
        # A change that was waiting before the read, and that the database does not have, was never committed.
        room.forget(early - {change.seq for change in changes})
        head = room.head or 0  # it may have moved on meanwhile
        room.remember([change for change in changes if change.seq > head and change.seq not in room.ahead])
        await self._advance(room, [change for change in changes if change.seq >= head])

    async def _start_over(self, room: Room, found: lookups.Heads, *, anew: bool) -> None:
        """Make each subscription read the room again, as if its client had subscribed."""
        room.repairing = False
        if anew:
            self._begin_anew(room, found)
        else:
            room.skip_to(found.seq, found.mark)
        await self._to_all(room, restart)
        await self._advance(room, [])

    def _begin_anew(self, room: Room, found: lookups.Heads) -> None:
        log.warning("another_history", conversation_id=room.conversation_id, head=room.head, found=found.seq)
        metrics.OTHER_HISTORIES.inc()
        room.begin_anew(found.seq, found.mark, found.members_version)


def restart(subscription: Subscription) -> None:
    """Make a subscription read its room again, unless it has ended: its session has no nursery any more."""
    if subscription.joined:
        subscription.listener.resync(subscription)
