"""Keeps in the database who is connected to this node, so that the backend's picture of it comes true.

The rules are those of `store.attendance`: whoever finds a difference between what is and what the backend was
told tells it, ten seconds late, so that a phone in a tunnel is no news. This node writes what it has, renews
its lease, and removes the leases of nodes that are gone. Where nobody wants to hear of presence it does the
last two alone.
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
AFRESH = 2.0  # seconds, for what this node has had for long and must write again
TICK = 0.5  # seconds between looks at what is to be done
TIDY = 3600.0  # seconds between removals of what has been gone for a day
ENDING = 20  # slices of a dead node's that are removed before this node renews its own lease

_EVENTS = {
    (USERS, True): "user.online",
    (USERS, False): "user.offline",
    (ROOMS, True): "room.occupied",
    (ROOMS, False): "room.vacated",
}
_ID = {USERS: "user_id", ROOMS: "conversation_id"}

log = structlog.get_logger()


class Delivery(Protocol):
    """What delivers webhooks. `full`: more of them wait than may be added to."""

    @property
    def full(self) -> bool: ...
    def wake(self) -> None: ...


class PresenceWebhooks:
    """Bounded by what this node has: a key is written at most twice a second, 500 in one transaction."""

    def __init__(
        self,
        table: PresenceTable,
        presence: Presence,
        leases: Leases,
        events: Collection[str],
        delivery: Delivery,
    ) -> None:
        """While the `delivery` is full, differences wait in the database; it is woken after webhooks were
        written.
        """
        self._table, self._presence, self._leases, self._delivery = table, presence, leases, delivery
        self._events = frozenset(events) & frozenset(_EVENTS.values())
        self._scopes = {scope for (scope, _), event in _EVENTS.items() if event in self._events}
        self._alone = presence.alone
        self._lease = self._fresh_lease()
        self._changed: dict[Key, float] = {}  # keys to write, and when they changed last
        self._doubts = True  # there may be some from before
        self._turned_at = self._looked_at = self._tidied_at = -math.inf
        self.finished = trio.Event()

    @property
    def counts_rooms(self) -> bool:
        return ROOMS in self._scopes

    @property
    def needed(self) -> bool:
        """Somebody wants to know: the backend, or another node whether this one is alive."""
        return bool(self._scopes) or not self._alone

    def _fresh_lease(self) -> Lease:
        return Lease(secrets.token_hex(8), self._presence.node)

    def note(self, key: Key) -> None:
        """This node has the first connection for a key, or lost the last."""
        if key[0] in self._scopes:
            self._changed[key] = trio.current_time()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until `stop`, when everybody has left: that is in the database then, and the lease is over."""
        task_status.started(self.finished)
        while not stop.is_set():
            with suppress(Unavailable):  # the writer says loudly enough that the database is gone
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
        """None where the lease was lost."""
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
        if turned.told:
            self._delivery.wake()
        await self._look(turned.others)
        return turned

    def _announce(self, scope: int, id: int, present: bool, version: int) -> tuple[str, bytes] | None:
        event = _EVENTS.get((scope, present))
        if event not in self._events or event is None:
            return None
        return event, callbacks.body(event, {_ID[scope]: id, "version": version})

    async def _begin_again(self) -> None:
        """Others took us for dead, or the database went back in time. All that we have is written once more."""
        log.warning("lease_lost", node=self._presence.node)
        self._lease = self._fresh_lease()
        changed_at = trio.current_time() - DEBOUNCE + AFRESH
        for count, key in enumerate(self._presence.own_keys(), 1):
            if key[0] in self._scopes:
                self._changed.setdefault(key, changed_at)
            if count % SLICE == 0:
                await trio.lowlevel.checkpoint()

    async def _look(self, others: list[Seen]) -> None:
        """Over the memory bus there is nobody else: other leases are of former processes.

        Their users have a moment to come back; those of a node that died under our eyes have had it.
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
