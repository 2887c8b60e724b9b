"""The fanout: one task that advances the heads of rooms and pushes what is new to their subscriptions.

Its one input is the bus. A hole is waited for a moment, then read from the database; what was read comes
back through the same queue, so that nobody else ever pushes a change. What nobody tells us the sweep finds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog
import trio
from msgspec import Struct

from chatd.core.errors import Unavailable
from chatd.core.model import Change, MemberChange, Notice, State
from chatd.core.protocol import event, text_frame
from chatd.hub.fanout.chunks import CHUNK_BYTES, Chunk, chunks
from chatd.hub.fanout.repair import RETRY, Repaired, Repairs, StartOver
from chatd.hub.fanout.rooms import Room, Rooms, Subscription
from chatd.hub.fanout.sweep import Sweep, check_rights
from chatd.observe import metrics
from chatd.store.read import lookups
from chatd.store.read.reader import Reader

QUEUE_BYTES = 64 * 1024 * 1024  # payloads that may wait; beyond it rooms are marked for repair
SIGNAL_BYTES = 256  # what a signal counts for
YIELD_EVERY = 200  # connections between checkpoints: 1 ms of pushing
HOLE_WAIT = 0.02  # seconds a hole may fill by itself: two nodes' publications cross each other

log = structlog.get_logger()


class Announcement(Struct):
    """Something for a room that has no seq and is not stored: a receipt, say, or a foreign payload."""

    conversation_id: int
    frame: bytes
    flat: bool = False  # whether a listener that knows nothing but messages gets it
    ephemeral: bool = False  # whether who reads too slowly does without
    lasting: bool = False  # whether who is just reading a snapshot gets it after that
    to: list[int] | None = None  # these users alone
    besides: int | None = None  # all but this user
    watchers: bool = False  # only who wants to know who is online

    @property
    def way(self) -> tuple[object, ...]:
        """Two that go the same way, one after the other, go as one."""
        return (
            *(self.conversation_id, self.flat, self.ephemeral, self.lasting),
            *(self.to, self.besides, self.watchers),
        )


class Checked(Struct):
    """Who is in a room was held against the database after these seqs were known of."""

    room: Room
    seqs: set[int]


class HeadKnown(Struct):
    """A room's head has become known: what came before it can be judged now."""

    room: Room


Item = Change | MemberChange | Announcement | Repaired | Checked | StartOver | HeadKnown


class Fanout:
    """What the bus brings for rooms; `reception` hands it over."""

    def __init__(self, rooms: Rooms, read: Reader) -> None:
        self.rooms, self._read = rooms, read
        self._queue: deque[Item] = deque()
        self._queued = 0
        self._wake = trio.Event()
        self._up = True
        self._oldest = math.inf  # trio's time of the first commit of this node in the queue
        self._nursery: trio.Nursery
        self._repairs = Repairs(rooms, read, self._put)
        self.sweep = Sweep(rooms, read, self._repairs.fallen_behind)
        # By user ids and a conversation; see `Registry.subscriptions_of`.
        self.addressed: Callable[[Iterable[int], int], Iterable[Subscription]]

    # Input: synchronous, bounded.

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        """`committed_at`: by trio's clock, if it was this node."""
        if committed_at is not None:
            self._oldest = min(self._oldest, committed_at)
        for change in changes:
            room = self.rooms.get(change.conversation_id)
            if room is None:
                continue
            if self._queued + len(change.payload) <= QUEUE_BYTES:
                self._queued += len(change.payload)
                self._put(change)
            elif not room.stale:
                room.stale = True
                self._put(HeadKnown(room))

    def member(self, change: MemberChange) -> None:
        if self.rooms.get(change.conversation_id) is None or self._queued > QUEUE_BYTES:
            return  # on overflow the sweep finds that the members have changed
        self._queued += SIGNAL_BYTES
        self._put(change)

    def notice(self, notice: Notice) -> None:
        frame = text_frame(bytes(notice.payload))
        one = Announcement(
            notice.conversation_id,
            frame,
            ephemeral=True,
            lasting=notice.lasting,
            to=notice.to,
            besides=notice.besides,
        )
        self.announce(one)

    def announce(self, item: Announcement) -> bool:
        """False where too much waits: it is not stored anywhere, so there is nothing to repair it from."""
        if self.rooms.get(item.conversation_id) is None:
            return True
        if self._queued + len(item.frame) > QUEUE_BYTES:
            return False
        self._queued += len(item.frame)
        last = self._queue[-1] if self._queue else None
        if (
            isinstance(last, Announcement)
            and len(last.frame) + len(item.frame) <= CHUNK_BYTES
            and last.way == item.way
        ):
            last.frame += item.frame
        else:
            self._put(item)
        return True

    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None:
        is_message = name == "message"
        frame = text_frame(payload)
        self.announce(Announcement(conversation_id, frame, flat=is_message, ephemeral=not is_message))

    def links(self, up: bool) -> None:
        self._up = up
        self.sweep.often = not up
        self.sweep.soon()

    def lost(self) -> None:
        self.sweep.soon()

    def doubt(self, conversation_id: int) -> None:
        """Somebody may not be entitled to this room any more: hold its rights against the database now."""
        if room := self.rooms.get(conversation_id):
            room.members_version = -1  # lower than any, so that no snapshot replaces it
            self.sweep.soon()

    def opened(self, room: Room, head: int, mark: str | None, members_version: int) -> None:
        """A session has read a snapshot of a room that it is in."""
        room.open(head, mark, members_version)
        if room.behind or room.in_doubt:
            self._put(HeadKnown(room))

    def doubt_history(self, room: Room) -> None:
        """What was read cannot follow what this room has told: hold it against the database now."""
        room.stale = True
        self._put(HeadKnown(room))

    def _put(self, item: Item) -> None:
        self._queue.append(item)
        self._wake.set()

    # The one task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self.sweep.run)
            self._repairs.nursery = self._nursery
            task_status.started()
            while True:
                if not self._queue:
                    self._wake = trio.Event()
                    await self._wake.wait()
                items, self._queue = self._queue, deque()
                oldest, self._oldest = self._oldest, math.inf
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
        """What a batch brings for one room goes out together; anything else keeps its place in the order."""
        gathered: dict[int, list[Change]] = {}
        for item in items:
            if isinstance(item, Change):
                self._queued -= len(item.payload)
                gathered.setdefault(item.conversation_id, []).append(item)
                continue
            await self._advance_all(gathered)
            gathered = {}
            match item:
                case MemberChange():
                    self._queued -= SIGNAL_BYTES
                    await self._tell_members(item)
                case Announcement():
                    self._queued -= len(item.frame)
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
            if room := self.rooms.get(conversation_id):
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
        """Over those who are there now; who leaves meanwhile says so itself. How many said yes."""
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
                    subscription.presence_missed = True  # the sweep has it answered anew
            else:
                subscription.announce(item.frame)

        if item.to is not None:
            # Not through the whole room: in a large one everybody's own receipts would cost its square.
            await self._to_each(list(self.addressed(item.to, item.conversation_id)), announce)
        elif room := self.rooms.get(item.conversation_id):
            await self._to_all(room, announce)

    async def _tell_members(self, change: MemberChange) -> None:
        room = self.rooms.get(change.conversation_id)
        if room is None:
            return
        # Those present were all held against this version or a later one: who came back since shall stay.
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
                else:  # who is just reading a snapshot was held against nothing yet: it may be an older one
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

    # Doubt: somebody was removed, and we were not told. The room waits for the database, the others do not.

    def _check_soon(self, room: Room) -> None:
        if not room.checking:
            room.checking = True
            self._nursery.start_soon(self._check, room)

    async def _check(self, room: Room) -> None:
        while room.in_doubt and self.rooms.get(room.conversation_id) is room:
            seqs = set(room.ahead)
            try:
                await check_rights(self._read, room)
            except Unavailable:
                await trio.sleep(RETRY)
            else:
                self._put(Checked(room, seqs))
                return
        room.checking = False

    # Repair: `repair` reads, what it has found comes back through the queue.

    async def _repaired(self, room: Room, changes: list[Change], early: set[int]) -> None:
        room.repairing = False
        # What is still early was never committed, whoever put it on the stream: the database does not know it.
        room.forget(early - {change.seq for change in changes})
        head = room.head or 0  # it may have moved on meanwhile
        room.remember([change for change in changes if change.seq > head and change.seq not in room.ahead])
        await self._advance(room, [change for change in changes if change.seq >= head])

    async def _start_over(self, room: Room, found: lookups.Heads, *, anew: bool) -> None:
        """Each subscription reads the room anew, as if it had asked."""
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
    if subscription.joined:  # who has left meanwhile has no nursery any more
        subscription.listener.resync(subscription)
