"""Repair: what a room has missed is read from the database, and whether its history is still the database's.

The fanout says which room; what was found goes back through its queue.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from msgspec import Struct

from chatd.core.errors import Unavailable
from chatd.core.model import Change
from chatd.hub.fanout.rooms import Room, Rooms
from chatd.observe import metrics
from chatd.store.read import lookups
from chatd.store.read.reader import Reader

RETRY = 1.0  # seconds between attempts while the database does not answer


class Repaired(Struct):
    """What a repair read after a room's head. `early` are the seqs that were waiting past the hole then."""

    room: Room
    changes: list[Change]
    early: set[int]


class StartOver(Struct):
    """A repair found more than can be pushed, or another history than the room's (`anew`)."""

    room: Room
    found: lookups.Heads
    anew: bool


class Repairs:
    """One read at a time for a room, for as long as it is behind."""

    def __init__(self, rooms: Rooms, read: Reader, put: Callable[[Repaired | StartOver], None]) -> None:
        self._rooms, self._read, self._put = rooms, read, put
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The reads live in here."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def fallen_behind(self, room: Room) -> None:
        """The sweep has found that the database stands elsewhere."""
        room.stale = True
        self.soon(room, 0)

    def soon(self, room: Room, wait: float) -> None:
        """In so many seconds, if the hole has not filled by then."""
        if not room.repairing:
            room.repairing = True
            self._nursery.start_soon(self._repair, room, wait)

    async def _repair(self, room: Room, wait: float) -> None:
        await trio.sleep(wait)
        while room.behind and self._rooms.get(room.conversation_id) is room:
            room.stale = False
            try:
                self._put(await self._find_missing(room))
                return
            except Unavailable:
                room.stale = True
                await trio.sleep(RETRY)
        room.repairing = False  # the hole has filled by itself, or nobody is there any more

    async def _find_missing(self, room: Room) -> Repaired | StartOver:
        assert room.head is not None
        early, after = set(room.ahead), room.head
        missing = await self._read(lookups.missing, room.conversation_id, after, room.mark)
        metrics.GAP_FILLS.inc()
        if after < missing.heads.low_seq:  # cut by retention: its history cannot be told
            return StartOver(room, missing.heads, anew=False)
        if not missing.same:
            return StartOver(room, missing.heads, anew=True)
        changes = missing.changes
        if missing.heads.seq <= room.head:
            return Repaired(room, changes, early)
        if changes and changes[0].seq == after + 1:  # of what was asked for: the head may have moved on
            return Repaired(room, changes, early)
        return StartOver(room, missing.heads, anew=False)  # too many
