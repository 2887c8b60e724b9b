"""Writes this node's presence to the database, and webhooks when presence differs from what
the backend was told.

`store.queues.presence` explains the tables. A difference must last ten seconds before the backend hears of it
(debounce), so a phone in a tunnel causes no event. This node also renews its lease and removes the leases of
dead nodes. If no webhook about presence is wanted, it does only these two.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from typing import Protocol

import structlog
import trio

from chatd.chat.leases import BEAT, Leases
from chatd.chat.presence import ROOMS, USERS, Key, Presence
from chatd.core import callbacks
from chatd.core.errors import Unavailable
from chatd.store.queues.presence import SLICE, Change, Lease, LeaseLost, PresenceTable, Seen, Turned

DEBOUNCE = 10.0  # seconds that a change must last before the backend hears of it
AFRESH = 2.0  # seconds of debounce for old presence that this node must write again after it lost its lease
TICK = 0.5  # seconds between two checks for work
TIDY = 3600.0  # seconds between two removals of rows that have been gone for a day
ENDING = 20  # slices of a dead node's rows to remove before this node renews its own lease

_EVENTS = {
    (USERS, True): "user.online",
    (USERS, False): "user.offline",
    (ROOMS, True): "room.occupied",
    (ROOMS, False): "room.vacated",
}
_ID = {USERS: "user_id", ROOMS: "conversation_id"}

log = structlog.get_logger()


class Delivery(Protocol):
    """The delivery of webhooks. `full`: so many events wait that no more about presence may be added."""

    @property
    def full(self) -> bool: ...
    def wake(self) -> None: ...


class PresenceWebhooks:
    """Its load is bounded: it writes a key at most twice per second, and 500 keys in one transaction."""

    def __init__(
        self,
        table: PresenceTable,
        presence: Presence,
        leases: Leases,
        events: Collection[str],
        delivery: Delivery,
    ) -> None:
        """`delivery` is woken after webhooks were written.

        While it is full, differences wait in the database.
        """
        self._table, self._presence, self._leases, self._delivery = table, presence, leases, delivery
        self._events = frozenset(events) & frozenset(_EVENTS.values())
        self._scopes = {scope for (scope, _), event in _EVENTS.items() if event in self._events}
        self._alone = presence.alone
        self._lease = self._fresh_lease()
        self._changed: dict[Key, float] = {}  # key to write → time of its last change
        self._doubts = True  # the database may have checks to do from before the start
        self._turned_at = self._looked_at = self._tidied_at = -math.inf
        self.finished = trio.Event()

    @property
    def counts_rooms(self) -> bool:
        return ROOMS in self._scopes

    @property
    def needed(self) -> bool:
        """Whether this must run: the backend wants events, or other nodes need this node's heartbeat."""
        return bool(self._scopes) or not self._alone

    def _fresh_lease(self) -> Lease:
        return Lease(secrets.token_hex(8), self._presence.node)

    def note(self, key: Key) -> None:
        """This node has got its first connection for a key, or lost its last."""
        if key[0] in self._scopes:
            self._changed[key] = trio.current_time()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run until `stop`, which must come after all connections have ended.

        Then write that, and end the lease.
        """
        task_status.started(self.finished)
        while not stop.is_set():
            with suppress(Unavailable):  # the writer reports that the database is gone
                await self._work()
            with trio.move_on_after(TICK):
                await stop.wait()
        try:
            await self._finish()
        except Unavailable:
            log.warning("attendance_unfinished", reason="the database does not answer")
        self.finished.set()

    async def _work(self) -> None:
        now = trio.current_time()
        renewal = now - self._turned_at >= BEAT and (self._doubts or not self._alone)
        while self._changed or renewal:
            turned = await self._turn()
            renewal = turned is None or turned.more
        if now - self._tidied_at >= TIDY and self._scopes:
            self._tidied_at = now
            await self._table.tidy()

    async def _turn(self) -> Turned | None:
        """Renew the lease and write up to `SLICE` changed keys. None: the lease was lost."""
        taken = dict(islice(self._changed.items(), SLICE))
        for key in taken:
            del self._changed[key]
        now = trio.current_time()
        changes = [
            Change(key, self._presence.has_own(key), max(0, math.ceil(changed_at + DEBOUNCE - now)))
            for key, changed_at in taken.items()
        ]
        announce = self._announce if self._scopes and not self._delivery.full else None
        try:
            turned = await self._table.turn(self._lease, changes, announce)
        except LeaseLost:
            self._changed = taken | self._changed
            await self._begin_again()
            return None
        except BaseException:
            self._changed = taken | self._changed
            raise
        self._turned_at, self._doubts = now, turned.doubts and bool(self._scopes)
        if turned.webhooks:
            self._delivery.wake()
        await self._look(turned.others)
        return turned

    def _announce(self, scope: int, id: int, present: bool, version: int) -> tuple[str, bytes] | None:
        event = _EVENTS.get((scope, present))
        if event not in self._events or event is None:
            return None
        return event, callbacks.body(event, {_ID[scope]: id, "version": version})

    async def _begin_again(self) -> None:
        """Take a new lease and write all keys again: other nodes ended the old lease, or the
        database was restored.
        """
        log.warning("lease_lost", node=self._presence.node)
        self._lease = self._fresh_lease()
        changed_at = trio.current_time() - DEBOUNCE + AFRESH
        for count, key in enumerate(self._presence.own_keys(), 1):
            if key[0] in self._scopes:
                self._changed.setdefault(key, changed_at)
            if count % SLICE == 0:
                await trio.lowlevel.checkpoint()

    async def _look(self, others: list[Seen]) -> None:
        """End the leases of dead nodes.

        With the memory bus there are no other nodes, so all other leases belong to former processes. Their
        users get the debounce time to reconnect. Users of a node that died while this one was running have had
        that time.
        """
        now = trio.current_time()
        if self._alone:
            gone, due_in = others, DEBOUNCE
        elif now - self._looked_at >= BEAT:
            gone, due_in = self._leases.see(others), 0.0
            self._looked_at = now
        else:
            return
        for one in gone:
            if not one.ending:
                log.info("node_gone", node=one.node)
            self._doubts = self._doubts or bool(self._scopes)
            for _ in range(ENDING):
                if await self._table.end(one.name, one.beat, due_in):
                    break

    async def _finish(self) -> None:
        while self._changed:
            await self._turn()
        if self._lease.beat:
            while not await self._table.end(self._lease.name, self._lease.beat, DEBOUNCE):
                pass
