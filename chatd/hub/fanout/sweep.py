"""The sweep: regularly compares the heads and rights of all active rooms with the database, because the bus
may lose changes and signals.

The fanout repairs a room that is behind. The sweep itself ends the subscriptions of users who may not be in a
room any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from chatd.core.errors import Unavailable
from chatd.core.model import State
from chatd.hub.fanout.rooms import Room, Rooms
from chatd.store.read import lookups
from chatd.store.read.reader import Reader

EVERY = 10.0  # seconds between sweeps
OFTEN = 1.0  # seconds between sweeps while the bus does not deliver other nodes' changes
ROOMS = 500  # rooms in one query
YIELD_EVERY = 200  # subscriptions between checkpoints: each may be ended, and its client notified

log = structlog.get_logger()


class Sweep:
    def __init__(
        self,
        rooms: Rooms,
        read: Reader,
        *,
        behind: Callable[[Room], None],
        members_seen: Callable[[Room, int], Awaitable[None]],
        check_logins: Callable[[], Awaitable[None]],
    ) -> None:
        """`behind` is called for each room whose head differs from the database's. `members_seen` is called for
        each room with its members_version in the database. `check_logins` is called after each sweep.
        """
        self._rooms, self._read, self._behind = rooms, read, behind
        self._members_seen, self._check_logins = members_seen, check_logins
        self._now = trio.Event()
        self._often = False

    def soon(self) -> None:
        self._now.set()

    def links(self, up: bool) -> None:
        """Whether the bus delivers other nodes' changes. While it does not, the sweep runs more often."""
        self._often = not up
        self.soon()

    def doubt(self, conversation_id: int) -> None:
        """A user may have lost the right to be in this room: compare its rights with the database soon."""
        if room := self._rooms.get(conversation_id):
            room.members_version = -1  # lower than any real version, so that no snapshot replaces it
            self.soon()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            with trio.move_on_after(OFTEN if self._often else EVERY):
                await self._now.wait()
            self._now = trio.Event()
            try:
                await self.once()
            except Unavailable:
                log.warning("sweep_failed", reason="the database does not answer")

    async def once(self) -> None:
        """Compare all rooms with the database. Raises Unavailable."""
        rooms = [room for room in self._rooms if room.head is not None]
        for start in range(0, len(rooms), ROOMS):
            part = {room: (room.head or 0, room.mark) for room in rooms[start : start + ROOMS]}
            heads = await self._read(lookups.heads, [room.conversation_id for room in part])
            for room, known in part.items():
                await self._compare(room, known, heads.get(room.conversation_id, lookups.Heads()))
        await self._check_logins()

    async def _compare(self, room: Room, known: tuple[int, str | None], found: lookups.Heads) -> None:
        """`known`: the room's head and mark before the database was read."""
        if found.members_version != room.members_version:
            await check_rights(self._read, room)  # first: a removed user shall not get what a repair finds
        await self._members_seen(room, found.members_version)
        head, mark = known
        went_back = found.seq < head or (found.seq == head and found.mark != mark)
        if went_back or found.seq > (room.head or 0):
            self._behind(room)


async def check_rights(read: Reader, room: Room) -> None:
    """End the subscriptions of users who may not be in a room any more. Raises Unavailable."""
    present = list(room.subscriptions)
    users = list({subscription.listener.user_id for subscription in present})
    version, states = await read(lookups.rights, room.conversation_id, users)
    known = room.members_version
    for count, subscription in enumerate(present, 1):
        state = states.get(subscription.listener.user_id)
        if subscription.joined and not (state is State.ACTIVE if state else subscription.entitled):
            subscription.listener.dropped(subscription)
        if count % YIELD_EVERY == 0:
            await trio.lowlevel.checkpoint()
    # A user who joined meanwhile may have an older snapshot, and a user who was checked may since have lost the
    # right that a token gave. If so, keep the old version, so that the next sweep checks again.
    if room.members_version == known and room.subscriptions.keys() <= set(present):
        room.members_version = version
