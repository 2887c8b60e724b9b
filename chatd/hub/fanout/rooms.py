"""The rooms of this node and their subscriptions. All methods are synchronous, so a cancelled task cannot
leave them half changed.

    Room           a conversation with a listener here: its head, its subscriptions, changes that came too early
    Subscription   one connection in one room, with its own cursor
    Membership     the rooms of one connection: it joins them only through this, and leaves all at its end

Only the fanout advances heads and delivers. Only a session settles its subscriptions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Self

from msgspec import UNSET
from msgspec.structs import replace

from chatd.core.model import Change
from chatd.hub.fanout.listeners import Listener, Watcher
from chatd.hub.fanout.subscription import Subscription

# Changes, and bytes of them, that a room holds while the missing changes before them, or its rights, are read.
AHEAD_CHANGES = 1000
AHEAD_BYTES = 1024 * 1024
REMEMBERED = 300  # changes of a room that a repair has read, and that the bus may still deliver


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
