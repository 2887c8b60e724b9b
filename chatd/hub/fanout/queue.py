"""What waits for the fanout, in the order in which it came. Synchronous, and bounded in bytes.

A change that does not fit marks its room as stale, and the database has it. A signal that does not fit is found
by the sweep, if it is about members. An announcement is stored nowhere, so its sender learns that it is lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import trio
from msgspec import Struct

from chatd.core.model import Change, MemberChange, Notice
from chatd.core.protocol import text_frame
from chatd.hub.fanout.chunks import CHUNK_BYTES
from chatd.hub.fanout.repair import Repaired, StartOver
from chatd.hub.fanout.rooms import Room, Rooms

QUEUE_BYTES = 64 * 1024 * 1024  # payloads that may wait; beyond it rooms are marked for repair
SIGNAL_BYTES = 256  # what a signal counts for


class Announcement(Struct):
    """Something for a room that has no seq and is not stored: a receipt, say, or a foreign payload."""

    conversation_id: int
    frame: bytes
    flat: bool = False  # whether a listener that knows nothing but messages gets it
    ephemeral: bool = False  # whether a slow consumer does without it
    lasting: bool = False  # whether a subscription that is reading a snapshot gets it after that
    to: list[int] | None = None  # these users alone
    besides: int | None = None  # all but this user
    watchers: bool = False  # only subscriptions that want to know who is online

    @property
    def way(self) -> tuple[object, ...]:
        """Two that go the same way, one after the other, go as one."""
        return (
            *(self.conversation_id, self.flat, self.ephemeral, self.lasting),
            *(self.to, self.besides, self.watchers),
        )


class Checked(Struct):
    """The subscriptions of a room were held against the database after these seqs were known."""

    room: Room
    seqs: set[int]


class HeadKnown(Struct):
    """The head of a room has become known: what came before it can be judged now."""

    room: Room


Item = Change | MemberChange | Announcement | Repaired | Checked | StartOver | HeadKnown


class FanoutQueue:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._items: deque[Item] = deque()
        self._bytes = 0  # of what waits, and of what the fanout is handling
        self._oldest = math.inf
        self._wake = trio.Event()

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        """`committed_at`: by trio's clock, if this node has committed them."""
        if committed_at is not None:
            self._oldest = min(self._oldest, committed_at)
        for change in changes:
            room = self._rooms.get(change.conversation_id)
            if room is None:
                continue
            if self._bytes + len(change.payload) <= QUEUE_BYTES:
                self._bytes += len(change.payload)
                self.put(change)
            elif not room.stale:
                room.stale = True
                self.put(HeadKnown(room))

    def member(self, change: MemberChange) -> None:
        if self._rooms.get(change.conversation_id) is None or self._bytes > QUEUE_BYTES:
            return  # on overflow the sweep finds that the members have changed
        self._bytes += SIGNAL_BYTES
        self.put(change)

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

    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None:
        is_message = name == "message"
        frame = text_frame(payload)
        self.announce(Announcement(conversation_id, frame, flat=is_message, ephemeral=not is_message))

    def announce(self, item: Announcement) -> bool:
        """False if the queue is full. It is stored nowhere, so nothing repairs it."""
        if self._rooms.get(item.conversation_id) is None:
            return True
        if self._bytes + len(item.frame) > QUEUE_BYTES:
            return False
        self._bytes += len(item.frame)
        last = self._items[-1] if self._items else None
        if (
            isinstance(last, Announcement)
            and len(last.frame) + len(item.frame) <= CHUNK_BYTES
            and last.way == item.way
        ):
            last.frame += item.frame
        else:
            self.put(item)
        return True

    def doubt_history(self, room: Room) -> None:
        """What was read cannot follow what this room has pushed: hold it against the database now."""
        room.stale = True
        self.put(HeadKnown(room))

    def put(self, item: Item) -> None:
        """For what has no size: the number of rooms bounds how many of these there are."""
        self._items.append(item)
        self._wake.set()

    async def take(self) -> tuple[deque[Item], float]:
        """All that waits, once something does; and when the oldest commit of this node in it was, by trio's
        clock (infinity if there is none). The fanout calls `release` for each item.
        """
        if not self._items:
            self._wake = trio.Event()
            await self._wake.wait()
        items, self._items = self._items, deque()
        oldest, self._oldest = self._oldest, math.inf
        return items, oldest

    def release(self, item: Item) -> None:
        """The fanout handles this one now."""
        match item:
            case Change():
                self._bytes -= len(item.payload)
            case MemberChange():
                self._bytes -= SIGNAL_BYTES
            case Announcement():
                self._bytes -= len(item.frame)
