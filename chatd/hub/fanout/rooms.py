"""The rooms of this node and their subscriptions. All methods are synchronous, so a cancelled task cannot
leave them half changed.

    Room           a conversation with a listener here: its head, its subscriptions, changes that came too early
    Subscription   one connection in one room, with its own cursor
    Membership     the rooms of one connection: it joins them only through this, and leaves all at its end

Only the fanout advances heads and delivers. Only a session settles its subscriptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Self

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from chatd.core.model import Change, Position
from chatd.hub.fanout.chunks import Chunk
from chatd.hub.fanout.listeners import Listener, Watcher

# Changes, and bytes of them, that a room holds while the missing changes before them, or its rights, are read.
AHEAD_CHANGES = 1000
AHEAD_BYTES = 1024 * 1024
REMEMBERED = 300  # changes of a room that a repair has read, and that the bus may still deliver
BUFFER_BYTES = 256 * 1024  # bytes that a subscription holds while its snapshot is read


class Subscription:
    """One connection in one room. No change with `seq <= cursor` is pushed to it, so a change that arrives
    twice (by replay, by repair, or by Redis from this node itself) is pushed once.

    `mark` is the mark of the change at the cursor: a change that does not follow it is of another history. If
    the mark is not known, `epoch` names the history.

    The subscription buffers from the moment it joins until its snapshot was sent, so that no change between
    the two is lost. It buffers again when its connection is too slow for a change, until it has caught up.
    """

    __slots__ = (
        *("_buffer", "_buffered", "_flat", "_opened", "_try_push", "cursor", "doubted", "entered", "entitled"),
        *("epoch", "joined", "listener", "lost", "mark", "presence", "presence_missed", "room", "visiting"),
    )

    def __init__(self, room: Room, listener: Listener, *, entitled: bool) -> None:
        self.room, self.listener, self.entitled = room, listener, entitled
        self._try_push, self._flat = listener.try_push, listener.flat  # bound here: each delivery needs them
        self.cursor = 0
        self.mark: str | UnsetType | None = None
        self.epoch: str | None = None
        self.joined = True
        self.entered = False  # a snapshot was sent: the client knows that it is in the room
        self.presence = False  # the client has asked for presence
        self.presence_missed = False  # a presence event was dropped, because the client reads too slowly
        self.visiting = False  # its user is counted as a visitor, that is, not as a member
        self.hold()

    @property
    def conversation_id(self) -> int:
        return self.room.conversation_id

    @property
    def buffering(self) -> bool:
        return self._buffer is not None

    def hold(self) -> None:
        """Buffer from now on, because a snapshot is about to be read."""
        self._buffer: list[Chunk | bytes] | None = []  # None: live
        self._buffered = 0
        self.lost = False  # a change was not kept in the buffer
        self.doubted = False  # the snapshot that is being read just now must be read again
        self._opened = self.room.head is not None

    def wait_at(self, position: Position, epoch: str | None) -> None:
        """Buffer without keeping anything, until a snapshot is about to be read: that may take long, and the
        snapshot then has all changes after `position`.
        """
        self.hold()
        self.lost = True
        self.cursor, self.mark, self.epoch = position.after or 0, position.mark, epoch
        self.entered = True

    def wait(self) -> None:
        """The same, from its own cursor."""
        self.wait_at(Position(self.cursor, self.mark), self.epoch)

    def distrust(self) -> None:
        """The snapshot that is being read may be older than a removal: discard the buffer, and have the
        snapshot read again.
        """
        if self._buffer is not None:
            self._buffer.clear()
            self.doubted = True

    def fits(self, seq: int, members_version: int | None = None) -> bool:
        """Whether a snapshot up to `seq`, followed by the buffer since `hold`, has every change, and the user
        may see all of them (see `settle`).
        """
        # If the room was opened meanwhile, no change below the head at that moment was delivered to anybody.
        whole = not self.lost and not self.doubted and (self._opened or seq >= (self.room.opened_at or 0))
        return whole and len(self._allowed(members_version)) == len(self._buffer or ())

    def settle(self, seq: int, mark: str | UnsetType | None = None, members_version: int | None = None) -> None:
        """The snapshot up to `seq` was sent: push the buffer after it. The subscription is live from now on.

        `members_version` is the snapshot's; None if the rights are known otherwise. A buffered change with a
        higher version was committed after a removal of some member, perhaps of this user. It is not pushed,
        and neither are the changes after it.
        """
        held, self._buffer = self._allowed(members_version), None
        self.cursor, self.mark, self.entered = seq, mark, True
        for item in held:
            if isinstance(item, bytes):
                self.announce(item)
            else:
                self.deliver(item)

    def deliver(self, chunk: Chunk) -> bool:
        """Push what is new of a chunk. Returns False if nothing was pushed."""
        if not self.joined:
            return False
        if self._buffer is not None:
            self._keep(chunk, len(chunk.joined))
            return False
        # The usual case first, for speed.
        if chunk.first == self.cursor + 1 and chunk.previous == self.mark and not self._flat:
            if self._try_push(chunk.joined):
                self.cursor, self.mark = chunk.last, chunk.mark
                return True
            self.listener.fall_behind(self)
            return False
        return self._advance(chunk)

    def announce(self, frame: bytes) -> None:
        """Push an event without a seq. It is kept in the buffer if the subscription is buffering."""
        if not self.joined:
            return
        if self._buffer is not None:
            self._keep(frame, len(frame))
        else:
            self.listener.push(frame)

    def offer(self, frame: bytes, *, lasting: bool = False) -> bool:
        """Push an ephemeral event. It is dropped for a slow consumer, and also for a subscription that is
        buffering, unless it is `lasting`.

        Returns False if it was dropped for a slow consumer: a subscription that is buffering is about to get a
        complete answer.
        """
        if not self.joined:
            return True
        if self._buffer is None:
            return self.listener.offer(frame)
        if lasting:
            self._keep(frame, len(frame))
        return True

    def _allowed(self, members_version: int | None) -> list[Chunk | bytes]:
        """Return the buffer up to the first change that is newer than this version of the rights."""
        known = math.inf if members_version is None else members_version
        return list(
            takewhile(lambda one: isinstance(one, bytes) or one.members_version <= known, self._buffer or ())
        )

    def _advance(self, chunk: Chunk) -> bool:
        if chunk.last <= self.cursor:
            return False
        if not chunk.follows(self.cursor, self.mark):  # a change is missing, or the history is another one
            self.listener.resync(self)
            return False
        frames = chunk.after(self.cursor, self._flat)
        if frames and not self._try_push(frames):
            self.listener.fall_behind(self)
            return False
        self.cursor, self.mark = chunk.last, chunk.mark
        return bool(frames)

    def _keep(self, item: Chunk | bytes, size: int) -> None:
        assert self._buffer is not None
        self._buffered += size
        if self._buffered > BUFFER_BYTES:
            self._buffer.clear()
            self.lost = True
        elif not self.lost and not self.doubted:
            self._buffer.append(item)


class Room:
    """A conversation with listeners on this node. `head` is the seq of the last change that was pushed here,
    and `mark` is its mark. Together they name a history.

    A change that contradicts them makes the room `stale`: the database decides which history is valid.
    """

    __slots__ = (
        *("_ahead_bytes", "_repaired", "ahead", "attended", "checking", "conversation_id", "head", "mark"),
        *("members_version", "opened_at", "repairing", "stale", "subscriptions"),
    )

    def __init__(self, conversation_id: int) -> None:
        self.conversation_id = conversation_id
        self.head: int | None = None  # None until the first snapshot was read
        self.mark: str | None = None
        self.opened_at: int | None = None  # the head as the first snapshot, or another history, has set it
        # The rights of all subscriptions were checked at this version of the members, or at a later one.
        self.members_version: int | None = None
        self.subscriptions: dict[Subscription, None] = {}  # used as an ordered set
        self.attended = 0  # subscriptions, not counting flat listeners
        self.ahead: dict[int, Change] = {}  # by seq: changes that wait for missing ones, or are in doubt
        self._ahead_bytes = 0
        # By seq: marks of changes that a repair has read and that the bus may deliver as well.
        self._repaired: dict[int, str | None] | None = None
        self.stale = False  # changes were dropped or contradict each other: read the database
        self.repairing = self.checking = False  # missing changes, or the rights, are being read

    @property
    def behind(self) -> bool:
        """Whether changes are known to be missing. False before the first snapshot, which reads everything."""
        return self.head is not None and (self.stale or bool(self.ahead)) and not self.in_doubt

    @property
    def in_doubt(self) -> bool:
        """Whether the next change has arrived, but it is not known which users may see it."""
        following = self.ahead.get(self.head + 1) if self.head is not None else None
        return following is not None and self._follows(following)

    def open(self, head: int, mark: str | None, members_version: int) -> None:
        """Take over the head of a snapshot. Keep the lowest members_version, so that the sweep compares
        again.
        """
        if self.head is None:
            self.opened_at = head
            self.skip_to(head, mark)
        elif head == self.head and mark != self.mark:
            self.stale = True
        if self.members_version is None or members_version < self.members_version:
            self.members_version = members_version

    def accept(self, changes: Sequence[Change]) -> list[Change]:
        """Advance the head over all changes that follow it without a gap or a doubt; return these in order.

        Old changes are dropped. Changes that cannot be held are read from the database later.
        """
        for change in changes:
            if self.head is None or change.seq > self.head:
                self.forget([change.seq])  # the change that arrived last counts: a repair has the database's
                self.ahead[change.seq] = change
                self._ahead_bytes += len(change.payload)
            elif self._contradicts(change):
                self.stale = True
        ready: list[Change] = []
        while following := self._next():
            ready.append(following)
        if len(self.ahead) > AHEAD_CHANGES or self._ahead_bytes > AHEAD_BYTES:
            self._drop_ahead()
            self.stale = True
        return ready

    def _next(self) -> Change | None:
        if self.head is None:
            return None
        change = self.ahead.get(self.head + 1)
        if change is None:
            return None
        if not self._follows(change):
            self.stale = True
            return None
        if change.members_version > (self.members_version or 0):
            return None
        self.head, self.mark = self.head + 1, change.mark
        self._ahead_bytes -= len(change.payload)
        return self.ahead.pop(self.head)

    def _follows(self, change: Change) -> bool:
        """Whether a change continues the history that was pushed here.

        False if its previous mark is not known (from an outbox, say), because it may continue another history.
        The repair reads it from the database then.
        """
        return change.previous == self.mark

    def _contradicts(self, change: Change) -> bool:
        """Whether an old change may be of another history. A change that arrived twice is not, as far as the
        room remembers.
        """
        if change.seq == self.head:
            return change.mark != self.mark
        if self._repaired and change.seq in self._repaired:
            return self._repaired.pop(change.seq) != change.mark
        return change.previous is not UNSET

    def remember(self, changes: Sequence[Change]) -> None:
        """Remember changes that were read from the database, so that they contradict nothing if the bus
        delivers them later.
        """
        if not changes:
            return
        repaired = self._repaired = self._repaired or {}
        repaired |= {change.seq: change.mark for change in changes}
        for seq in list(islice(repaired, max(0, len(repaired) - REMEMBERED))):
            del repaired[seq]

    def clear_doubt(self, seqs: Iterable[int]) -> None:
        """The rights of all subscriptions were read from the database after these changes had been
        committed.
        """
        for seq in seqs:
            if change := self.ahead.get(seq):
                self.ahead[seq] = replace(change, members_version=0)

    def forget(self, seqs: Iterable[int]) -> None:
        """Discard changes that the room holds."""
        for seq in seqs:
            if change := self.ahead.pop(seq, None):
                self._ahead_bytes -= len(change.payload)

    def skip_to(self, head: int, mark: str | None) -> None:
        """Continue from `head`. Each subscription reads the changes before it from the database itself."""
        if self.head is None or head > self.head:
            self.head, self.mark = head, mark
        self.forget([seq for seq in self.ahead if seq <= self.head])

    def begin_anew(self, head: int, mark: str | None, members_version: int) -> None:
        """The database has another history, with this head. The caller makes all subscriptions read it."""
        self.head, self.mark, self.opened_at = head, mark, head
        # The members_version of the old history is not valid in this one. The snapshot that each subscription
        # reads now checks its user's rights.
        self.members_version = members_version
        self._repaired = None
        self._drop_ahead()  # it is not known to which history these changes belong
        self.stale = True

    def _drop_ahead(self) -> None:
        self.ahead.clear()
        self._ahead_bytes = 0


class Rooms:
    """The rooms of this node. The first subscription creates a room, and the last one removes it."""

    def __init__(self) -> None:
        self._rooms: dict[int, Room] = {}
        self.subscriptions = 0  # in all of them

    def __len__(self) -> int:
        return len(self._rooms)

    def __iter__(self) -> Iterator[Room]:
        return iter(list(self._rooms.values()))

    def get(self, conversation_id: int) -> Room | None:
        return self._rooms.get(conversation_id)

    def join(self, conversation_id: int, listener: Listener, *, entitled: bool) -> Subscription:
        room = self._rooms.get(conversation_id)
        if room is None:
            room = self._rooms[conversation_id] = Room(conversation_id)
        subscription = Subscription(room, listener, entitled=entitled)
        room.subscriptions[subscription] = None
        self.subscriptions += 1
        room.attended += not listener.flat
        return subscription

    def leave(self, subscription: Subscription) -> None:
        subscription.joined = False
        room = subscription.room
        del room.subscriptions[subscription]
        self.subscriptions -= 1
        room.attended -= not subscription.listener.flat
        if not room.subscriptions:
            del self._rooms[room.conversation_id]


class Membership:
    """The subscriptions of one connection: `with Membership(rooms) as mine:` leaves them all at the end."""

    __slots__ = ("_rooms", "_subscriptions", "_watcher")

    def __init__(self, rooms: Rooms, watcher: Watcher | None = None) -> None:
        """`watcher` is called for each subscription that begins or ends."""
        self._rooms, self._watcher = rooms, watcher
        self._subscriptions: dict[int, Subscription] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave_all()

    def leave_all(self) -> None:
        for conversation_id in list(self._subscriptions):
            self.leave(conversation_id)

    def __len__(self) -> int:
        return len(self._subscriptions)

    def __iter__(self) -> Iterator[Subscription]:
        return iter(list(self._subscriptions.values()))

    def __contains__(self, conversation_id: int) -> bool:
        return conversation_id in self._subscriptions

    def get(self, conversation_id: int) -> Subscription | None:
        return self._subscriptions.get(conversation_id)

    def join(self, conversation_id: int, listener: Listener, *, entitled: bool) -> Subscription:
        """Return the connection's subscription to a room, or create one, which is buffering."""
        subscription = self._subscriptions.get(conversation_id)
        if subscription is None:
            subscription = self._rooms.join(conversation_id, listener, entitled=entitled)
            self._subscriptions[conversation_id] = subscription
            if self._watcher is not None:
                self._watcher.joined(subscription)
        return subscription

    def leave(self, conversation_id: int) -> bool:
        """End the subscription to a room. Returns False if there was none."""
        subscription = self._subscriptions.pop(conversation_id, None)
        if subscription is not None:
            self._rooms.leave(subscription)
            if self._watcher is not None:
                self._watcher.left(subscription)
        return subscription is not None
