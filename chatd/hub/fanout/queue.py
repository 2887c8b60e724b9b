"""The fanout's queue: first in, first out, bounded in bytes. All methods but `take` are synchronous.

A change that does not fit marks its room as stale, so that it is read from the database. What a signal about
members would have said is found by the sweep. An announcement that does not fit is lost, because it is stored
nowhere: `announce` tells its caller.
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

QUEUE_BYTES = 64 * 1024 * 1024  # bytes of payloads that may wait; beyond it rooms are marked for repair
SIGNAL_BYTES = 256  # bytes that one signal counts for


class Announcement(Struct):
    """An event for a room that has no seq and is not stored: a receipt, say, or another program's payload."""

    conversation_id: int
    frame: bytes
    flat: bool = False  # whether flat listeners get it
    ephemeral: bool = False  # whether it is dropped for a slow consumer
    lasting: bool = False  # whether a subscription that is reading a snapshot gets it afterwards
    to: list[int] | None = None  # only these users get it
    besides: int | None = None  # this user does not get it
    watchers: bool = False  # only subscriptions that asked for presence get it

    @property
    def way(self) -> tuple[object, ...]:
        """Two consecutive announcements with an equal `way` have the same receivers, so they are joined."""
        return (
            *(self.conversation_id, self.flat, self.ephemeral, self.lasting),
            *(self.to, self.besides, self.watchers),
        )


class Checked(Struct):
    """The rights in a room were read from the database after these seqs had been committed."""

    room: Room
    seqs: set[int]


class HeadKnown(Struct):
    """The head of a room has become known: changes that arrived before can be handled now."""

    room: Room


Item = Change | MemberChange | Announcement | Repaired | Checked | StartOver | HeadKnown


class FanoutQueue:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._items: deque[Item] = deque()
        self._bytes = 0  # payloads in the queue, and those of the batch that the fanout is handling
        self._oldest = math.inf
        self._wake = trio.Event()

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        """`committed_at`: when this node committed them, by trio's clock; None for another node's changes."""
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
            return  # if the queue is full, the sweep finds that the members have changed
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
        """Queue an announcement. Returns False if the queue is full: the announcement is lost then."""
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
        """A snapshot contradicts what this room has pushed: have the room compared with the database."""
        room.stale = True
        self.put(HeadKnown(room))

    def put(self, item: Item) -> None:
        """Queue an item without counting bytes. The number of rooms bounds how many of these there are."""
        self._items.append(item)
        self._wake.set()

    async def take(self) -> tuple[deque[Item], float]:
        """Wait until the queue is not empty, and take all of it. Also returns the time of the oldest commit of
        this node in it, by trio's clock (infinity if there is none). The fanout calls `release` for each item.
        """
        if not self._items:
            self._wake = trio.Event()
            await self._wake.wait()
        items, self._items = self._items, deque()
        oldest, self._oldest = self._oldest, math.inf
        return items, oldest

    def release(self, item: Item) -> None:
        """The fanout has begun to handle this item: its bytes do not count any more."""
        match item:
            case Change():
                self._bytes -= len(item.payload)
            case MemberChange():
                self._bytes -= SIGNAL_BYTES
            case Announcement():
                self._bytes -= len(item.frame)
