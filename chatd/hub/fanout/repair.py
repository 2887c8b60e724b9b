"""Repair: reads the changes that a room has missed, and checks whether the room's history is the database's.

The fanout asks for the repair of a room, and gets the result through its queue.
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
    """The changes after a room's head, as a repair read them. `early` has the seqs that the room was holding
    past the missing changes before the read.
    """

    room: Room
    changes: list[Change]
    early: set[int]


class StartOver(Struct):
    """A repair found more changes than can be pushed, or another history than the room's (`anew`)."""

    room: Room
    found: lookups.Heads
    anew: bool


class Repairs:
    """Reads for each room, one read at a time, for as long as the room is behind."""

    def __init__(self, rooms: Rooms, read: Reader, put: Callable[[Repaired | StartOver], None]) -> None:
        self._rooms, self._read, self._put = rooms, read, put
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the reads, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def fallen_behind(self, room: Room) -> None:
        """The sweep has found that the room's head differs from the database's."""
        room.stale = True
        self.soon(room, 0)

    def soon(self, room: Room, wait: float) -> None:
        """Repair the room in `wait` seconds, if changes are still missing then."""
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
        room.repairing = False  # the missing changes have arrived, or nobody is in the room any more

    async def _find_missing(self, room: Room) -> Repaired | StartOver:
        assert room.head is not None
        early, after = set(room.ahead), room.head
        missing = await self._read(lookups.missing, room.conversation_id, after, room.mark)
        metrics.GAP_FILLS.inc()
        if after < missing.heads.low_seq:  # retention has deleted the changes after the room's head
            return StartOver(room, missing.heads, anew=False)
        if not missing.same:
            return StartOver(room, missing.heads, anew=True)
        changes = missing.changes
        if missing.heads.seq <= room.head:
            return Repaired(room, changes, early)
        if changes and changes[0].seq == after + 1:  # compare with `after`: the head may have advanced
            return Repaired(room, changes, early)
        return StartOver(room, missing.heads, anew=False)  # too many changes are missing
