"""Who hears which conversation on this node. Pure and synchronous: cancellation cannot tear it.

    Room           a conversation somebody here listens to: its head, its subscriptions, what came too early
    Subscription   one connection in one room, with its own cursor
    Membership     the rooms of one connection: the only way in, and out of all of them at its end

The fanout alone advances heads and delivers; a session alone settles its subscriptions.
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

# What a room holds while a hole before it, or who may hear it, is being read: changes, and bytes of them.
AHEAD_CHANGES = 1000
AHEAD_BYTES = 1024 * 1024
REMEMBERED = 300  # changes of a room that a repair has brought, and the bus may bring late
BUFFER_BYTES = 256 * 1024  # what a subscription holds while its snapshot is being read


class Subscription:
    """Nothing with `seq <= cursor` is pushed to it: replay, repair and the echo through Redis are safe.
    `mark` is that of the change at the cursor: what does not follow that one is of another history. Where it is
    not known, the history is the one that `epoch` names.

    It is buffering from the moment it joins until its snapshot is answered, so that no change falls between;
    and again where its connection has no room for a change, until it has caught up.
    """

    __slots__ = (
        *("_buffer", "_buffered", "_flat", "_opened", "_try_push", "cursor", "doubted", "entered", "entitled"),
        *("epoch", "joined", "listener", "lost", "mark", "presence", "presence_missed", "room", "visiting"),
    )

    def __init__(self, room: Room, listener: Listener, *, entitled: bool) -> None:
        self.room, self.listener, self.entitled = room, listener, entitled
        self._try_push, self._flat = listener.try_push, listener.flat  # at hand: needed for each delivery
        self.cursor = 0
        self.mark: str | UnsetType | None = None
        self.epoch: str | None = None
        self.joined = True
        self.entered = False  # a snapshot was answered: the client knows that it is in
        self.presence = False  # it wants to know who comes online and goes
        self.presence_missed = False  # … and was not told of somebody, for it reads too slowly
        self.visiting = False  # it is in without being a member, and counted as such
        self.hold()

    @property
    def conversation_id(self) -> int:
        return self.room.conversation_id

    @property
    def buffering(self) -> bool:
        return self._buffer is not None

    def hold(self) -> None:
        """Buffer from now on: a snapshot is about to be read."""
        self._buffer: list[Chunk | bytes] | None = []  # None: live
        self._buffered = 0
        self.lost = False  # something that came was not kept
        self.doubted = False  # the snapshot that is being read just now must be read again
        self._opened = self.room.head is not None

    def wait_at(self, position: Position, epoch: str | None) -> None:
        """Keep nothing until a snapshot is about to be read: that may take long, and all of it is read then."""
        self.hold()
        self.lost = True
        self.cursor, self.mark, self.epoch = position.after or 0, position.mark, epoch
        self.entered = True

    def wait(self) -> None:
        """The same, from where it stands."""
        self.wait_at(Position(self.cursor, self.mark), self.epoch)

    def distrust(self) -> None:
        """The snapshot that is being read may be older than a removal: keep nothing, and have it read again."""
        if self._buffer is not None:
            self._buffer.clear()
            self.doubted = True

    def fits(self, seq: int, members_version: int | None = None) -> bool:
        """Whether a snapshot that reaches `seq`, with what was buffered since `hold`, leaves no change out, and
        all of that may be told (see `settle`)."""
        # A room that was opened meanwhile: what lies below the head it was opened at has been pushed to nobody.
        whole = not self.lost and not self.doubted and (self._opened or seq >= (self.room.opened_at or 0))
        return whole and len(self._allowed(members_version)) == len(self._buffer or ())

    def settle(self, seq: int, mark: str | UnsetType | None = None, members_version: int | None = None) -> None:
        """The snapshot reached `seq` and was answered: what was buffered follows it; live from now on.

        `members_version`: the snapshot's; None: the rights are known otherwise. A change before which somebody
        was removed after that is not told, nor what follows it: it may be this one who was.
        """
        held, self._buffer = self._allowed(members_version), None
        self.cursor, self.mark, self.entered = seq, mark, True
        for item in held:
            if isinstance(item, bytes):
                self.announce(item)
            else:
                self.deliver(item)

    def deliver(self, chunk: Chunk) -> bool:
        """False when it was not new, or not for this one."""
        if not self.joined:
            return False
        if self._buffer is not None:
            self._keep(chunk, len(chunk.joined))
            return False
        # Nearly always:
        if chunk.first == self.cursor + 1 and chunk.previous == self.mark and not self._flat:
            if self._try_push(chunk.joined):
                self.cursor, self.mark = chunk.last, chunk.mark
                return True
            self.listener.fall_behind(self)
            return False
        return self._advance(chunk)

    def announce(self, frame: bytes) -> None:
        """Something without a seq that must not be lost while buffering."""
        if not self.joined:
            return
        if self._buffer is not None:
            self._keep(frame, len(frame))
        else:
            self.listener.push(frame)

    def offer(self, frame: bytes, *, lasting: bool = False) -> bool:
        """Something that is worth little later: who reads too slowly does without, and who is not live yet,
        unless it is `lasting`. False for the first of these: who is not live yet is about to be answered."""
        if not self.joined:
            return True
        if self._buffer is None:
            return self.listener.offer(frame)
        if lasting:
            self._keep(frame, len(frame))
        return True

    def _allowed(self, members_version: int | None) -> list[Chunk | bytes]:
        """What was buffered, up to what a snapshot of this version does not say who may hear."""
        known = math.inf if members_version is None else members_version
        return list(
            takewhile(lambda one: isinstance(one, bytes) or one.members_version <= known, self._buffer or ())
        )

    def _advance(self, chunk: Chunk) -> bool:
        if chunk.last <= self.cursor:
            return False
        if not chunk.follows(self.cursor, self.mark):  # a hole, or another history: nobody is lied to
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
    """`head` is the last change that was pushed here, and `mark` its mark: together they name a history.

    A change that contradicts them makes the room `stale`: only the database knows which history is its own.
    """

    __slots__ = (
        *("_ahead_bytes", "_repaired", "ahead", "attended", "checking", "conversation_id", "head", "mark"),
        *("members_version", "opened_at", "repairing", "stale", "subscriptions"),
    )

    def __init__(self, conversation_id: int) -> None:
        self.conversation_id = conversation_id
        self.head: int | None = None  # None until a first snapshot says it
        self.mark: str | None = None
        self.opened_at: int | None = None  # where the first snapshot, or a new beginning, has put the head
        self.members_version: int | None = None  # everybody here was held against it, or a later one
        self.subscriptions: dict[Subscription, None] = {}  # a set that keeps its order
        self.attended = 0  # of them, not counting flat listeners
        self.ahead: dict[int, Change] = {}  # changes past a hole or in doubt, by seq
        self._ahead_bytes = 0
        self._repaired: dict[int, str | None] | None = None  # marks of what may come by the bus as well, by seq
        self.stale = False  # changes were dropped or contradict each other: only the database knows which
        self.repairing = self.checking = False  # somebody reads what is missing, or who may be here

    @property
    def behind(self) -> bool:
        """Something is known to be missing. Not before the first snapshot: that reads everything."""
        return self.head is not None and (self.stale or bool(self.ahead)) and not self.in_doubt

    @property
    def in_doubt(self) -> bool:
        """The next change is there, but who may hear it is not known."""
        following = self.ahead.get(self.head + 1) if self.head is not None else None
        return following is not None and self._follows(following)

    def open(self, head: int, mark: str | None, members_version: int) -> None:
        """A snapshot says where the conversation stands. The lowest version makes the sweep look again."""
        if self.head is None:
            self.opened_at = head
            self.skip_to(head, mark)
        elif head == self.head and mark != self.mark:
            self.stale = True
        if self.members_version is None or members_version < self.members_version:
            self.members_version = members_version

    def accept(self, changes: Sequence[Change]) -> list[Change]:
        """Advance the head over what follows it without a hole or a doubt; returns that, in order.

        Old is dropped. What cannot be kept is read again later.
        """
        for change in changes:
            if self.head is None or change.seq > self.head:
                self.forget([change.seq])  # the one that came last counts: a repair brings the database's
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
        """Whether the next change continues the history that was told here.

        One whose previous mark is not known (from an outbox, say) may continue another: the repair reads it.
        """
        return change.previous == self.mark

    def _contradicts(self, change: Change) -> bool:
        """Whether an old change may be of another history: what came twice is not, as far as that is known."""
        if change.seq == self.head:
            return change.mark != self.mark
        if self._repaired and change.seq in self._repaired:
            return self._repaired.pop(change.seq) != change.mark
        return change.previous is not UNSET

    def remember(self, changes: Sequence[Change]) -> None:
        """These were read from the database; when the bus brings them late, they are no surprise."""
        if not changes:
            return
        repaired = self._repaired = self._repaired or {}
        repaired |= {change.seq: change.mark for change in changes}
        for seq in list(islice(repaired, max(0, len(repaired) - REMEMBERED))):
            del repaired[seq]

    def clear_doubt(self, seqs: Iterable[int]) -> None:
        """Everybody here was held against the database after these had been committed."""
        for seq in seqs:
            if change := self.ahead.get(seq):
                self.ahead[seq] = replace(change, members_version=0)

    def forget(self, seqs: Iterable[int]) -> None:
        """Do not wait any more for the hole before these."""
        for seq in seqs:
            if change := self.ahead.pop(seq, None):
                self._ahead_bytes -= len(change.payload)

    def skip_to(self, head: int, mark: str | None) -> None:
        """Go on from `head`; what lies before is read by each subscription on its own."""
        if self.head is None or head > self.head:
            self.head, self.mark = head, mark
        self.forget([seq for seq in self.ahead if seq <= self.head])

    def begin_anew(self, head: int, mark: str | None, members_version: int) -> None:
        """The database holds another history, which stands here. All subscriptions are to be read anew."""
        self.head, self.mark, self.opened_at = head, mark, head
        # The old history's version says nothing about this one. The snapshot that each subscription reads now
        # checks its user's rights.
        self.members_version = members_version
        self._repaired = None
        self._drop_ahead()  # nobody knows of which history that is
        self.stale = True

    def _drop_ahead(self) -> None:
        self.ahead.clear()
        self._ahead_bytes = 0


class Rooms:
    """The rooms that somebody on this node is in. A room is made by its first and goes with its last."""

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
        """`watcher` hears of each subscription that begins or ends here."""
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
        """The subscription to a room: the one there is, or a fresh one, which is buffering."""
        subscription = self._subscriptions.get(conversation_id)
        if subscription is None:
            subscription = self._rooms.join(conversation_id, listener, entitled=entitled)
            self._subscriptions[conversation_id] = subscription
            if self._watcher is not None:
                self._watcher.joined(subscription)
        return subscription

    def leave(self, conversation_id: int) -> bool:
        """False if it was not there."""
        subscription = self._subscriptions.pop(conversation_id, None)
        if subscription is not None:
            self._rooms.leave(subscription)
            if self._watcher is not None:
                self._watcher.left(subscription)
        return subscription is not None
