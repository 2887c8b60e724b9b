"""The queue of events for the backend's webhook: claims some for delivery, and records how that went.

The transaction that makes a change also writes its event; `chatd.backend.webhooks` delivers it. An event that
was never tried is due since `LONG_AGO`, so it comes before all others even if a clock is set back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import trio
from msgspec import Struct
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    bindparam,
    case,
    delete,
    false,
    func,
    select,
    true,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import Unavailable
from chatd.store.clock import LONG_AGO, Clock
from chatd.store.schema import webhooks

DEAD_KEPT = 7 * 24 * 3600.0  # seconds that a given-up event is kept, so that an operator can inspect it
ERROR_CHARS = 200

T = TypeVar("T")


class Waiting(Struct, frozen=True):
    """A claimed event. `attempts`: the number of attempts before this one."""

    id: int
    event: str
    body: bytes
    attempts: int


class Failed(Struct, frozen=True):
    """A failed attempt. `again_in`: seconds until the next one; None: the event is given up."""

    id: int
    error: str
    again_in: float | None


class WebhookQueue:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)
        # Leases of claims whose COMMIT got no answer. If it was committed, no delivery has
        # these events: free them.
        self._unsure: set[str] = set()

    async def claim(self, most: int, lease: float, *, again: bool) -> list[Waiting]:
        """Claim up to `most` due events: with `again` those that failed before, else those never tried.

        Nobody else gets them for `lease` seconds. Raises Unavailable.
        """
        return await self._claiming(_claim, most, lease, again)

    async def claim_some(self, lease: float, *, again: bool) -> list[Waiting]:
        """Claim the oldest and the newest due event of each kind. Raises Unavailable.

        This is for a backend that fails: it may fail on one kind of event, or on one old event, only.
        """
        return await self._claiming(_claim_some, lease, again)

    async def _claiming(self, work: Callable[..., list[Waiting]], *arguments: Any) -> list[Waiting]:
        unsure, attempted = list(self._unsure), list[str]()
        try:
            found = await self._in_thread(work, *arguments, unsure, attempted)
        except Unavailable:
            self._unsure.update(attempted)
            raise
        self._unsure.difference_update(unsure)
        return found

    async def settle(self, done: Sequence[int], failed: Sequence[Failed], untried: Sequence[int] = ()) -> None:
        """Record the results of claimed events, given by id. `untried` events become free again.

        Raises Unavailable; events that were delivered may then be delivered again (at-least-once).
        """
        await self._in_thread(_settle, done, failed, untried)

    async def counts(self) -> tuple[int, int]:
        """Remove given-up events that are too old, and count (waiting, given up). Raises Unavailable."""
        return await self._in_thread(_count)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        def run() -> T:
            try:
                with self._engine.begin() as connection:
                    return work(connection, *arguments)
            except (SQLAlchemyError, OSError) as error:
                raise Unavailable() from error

        return await trio.to_thread.run_sync(run, limiter=self._thread)


def _due(clock: Clock, again: bool) -> ColumnElement[bool]:
    tried = webhooks.c.attempts > 0 if again else webhooks.c.attempts == 0
    return (webhooks.c.dead == false()) & (webhooks.c.due_at <= clock()) & tried


def _claim(
    connection: Connection, most: int, lease: float, again: bool, unsure: list[str], attempted: list[str]
) -> list[Waiting]:
    clock = Clock(connection)
    _free(connection, webhooks.c.due_at.in_(unsure), clock, unsure)
    wanted = _due(clock, again)
    if again:
        wanted &= webhooks.c.due_at > LONG_AGO  # lets the index skip the events that were never tried
    return _take(connection, wanted, most, clock(lease), attempted)


def _claim_some(
    connection: Connection, lease: float, again: bool, unsure: list[str], attempted: list[str]
) -> list[Waiting]:
    clock = Clock(connection)
    _free(connection, webhooks.c.due_at.in_(unsure), clock, unsure)
    ends = select(func.min(webhooks.c.id), func.max(webhooks.c.id)).where(_due(clock, again))
    ids = {id for row in connection.execute(ends.group_by(webhooks.c.event)) for id in row}
    wanted = _due(clock, again) & webhooks.c.id.in_(ids)
    return _take(connection, wanted, len(ids), clock(lease), attempted) if ids else []


def _take(
    connection: Connection, wanted: ColumnElement[bool], most: int, until: str, attempted: list[str]
) -> list[Waiting]:
    due = (
        select(webhooks.c.id, webhooks.c.event, webhooks.c.body, webhooks.c.attempts)
        .where(wanted)
        .order_by(webhooks.c.due_at, webhooks.c.id)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    found = [Waiting(*row) for row in connection.execute(due)]
    if found:
        ids = [one.id for one in found]
        attempted.append(until)
        connection.execute(update(webhooks).where(webhooks.c.id.in_(ids)).values(due_at=until))
    return found


_MOMENT = webhooks.c.due_at.type
_FREE = update(webhooks).values(
    due_at=case(
        (webhooks.c.attempts == 0, bindparam("at_once", type_=_MOMENT)), else_=bindparam("now", type_=_MOMENT)
    )
)


_FAIL = (
    update(webhooks)
    .where(webhooks.c.id == bindparam("key"))
    .values(
        attempts=webhooks.c.attempts + 1,
        due_at=bindparam("due"),
        dead=bindparam("gone"),
        error=bindparam("why"),
    )
)


def _free(connection: Connection, those: ColumnElement[bool], clock: Clock, wanted: Sequence[object]) -> None:
    if wanted:
        connection.execute(_FREE.where(those), {"at_once": LONG_AGO, "now": clock()})


def _settle(
    connection: Connection, done: Sequence[int], failed: Sequence[Failed], untried: Sequence[int]
) -> None:
    clock = Clock(connection)
    if done:
        connection.execute(delete(webhooks).where(webhooks.c.id.in_(done)))
    _free(connection, webhooks.c.id.in_(untried), clock, untried)
    for one in failed:
        gone = one.again_in is None
        row = {"key": one.id, "due": clock(one.again_in or 0), "gone": gone, "why": one.error[:ERROR_CHARS]}
        connection.execute(_FAIL, row)


def _count(connection: Connection) -> tuple[int, int]:
    old = Clock(connection)(-DEAD_KEPT)
    connection.execute(delete(webhooks).where(webhooks.c.dead == true(), webhooks.c.due_at < old))
    rows = connection.execute(select(webhooks.c.dead, func.count()).group_by(webhooks.c.dead))
    counts = {bool(dead): count for dead, count in rows}
    return counts.get(False, 0), counts.get(True, 0)
