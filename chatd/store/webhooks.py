"""Events for the backend's webhook that were not delivered yet: claim some, note what became of them.

The writer fills the table, in the transaction of what an event tells of; `chatd.webhooks` delivers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import trio
from msgspec import Struct
from sqlalchemy import Connection, Engine, bindparam, delete, false, func, select, true, update
from sqlalchemy.exc import SQLAlchemyError

from chatd.errors import Unavailable
from chatd.model import timestamp
from chatd.store.schema import webhooks

DEAD_KEPT = 7 * 24 * 3600.0  # seconds that an event which was given up is kept, for people to look at
ERROR_CHARS = 200

T = TypeVar("T")


class Waiting(Struct, frozen=True):
    """`attempts` were made before."""

    id: int
    event: str
    body: bytes
    attempts: int


class Failed(Struct, frozen=True):
    """`again_in`: seconds; None: given up."""

    id: int
    error: str
    again_in: float | None


class Webhooks:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)

    async def claim(self, most: int, lease: float) -> list[Waiting]:
        """The next that are due. Nobody else gets them for `lease` seconds. Raises Unavailable."""
        return await self._in_thread(_claim, most, lease)

    async def settle(self, done: Sequence[int], failed: Sequence[Failed], untried: Sequence[int] = ()) -> None:
        """`untried` are free again. Raises Unavailable: what was delivered may be delivered again then."""
        await self._in_thread(_settle, done, failed, untried)

    async def counts(self) -> tuple[int, int]:
        """(waiting, given up), after what is too old has gone. Raises Unavailable."""
        return await self._in_thread(_count)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        def run() -> T:
            try:
                with self._engine.begin() as connection:
                    return work(connection, *arguments)
            except (SQLAlchemyError, OSError) as error:
                raise Unavailable() from error

        return await trio.to_thread.run_sync(run, limiter=self._thread)


def _claim(connection: Connection, most: int, lease: float) -> list[Waiting]:
    due = (
        select(webhooks.c.id, webhooks.c.event, webhooks.c.body, webhooks.c.attempts)
        .where(webhooks.c.dead == false(), webhooks.c.due_at <= _in(0))
        .order_by(webhooks.c.due_at, webhooks.c.id)
        .limit(most)
        .with_for_update(skip_locked=True)
    )
    found = [Waiting(*row) for row in connection.execute(due)]
    if found:
        ids = [one.id for one in found]
        connection.execute(update(webhooks).where(webhooks.c.id.in_(ids)).values(due_at=_in(lease)))
    return found


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


def _settle(
    connection: Connection, done: Sequence[int], failed: Sequence[Failed], untried: Sequence[int]
) -> None:
    if done:
        connection.execute(delete(webhooks).where(webhooks.c.id.in_(done)))
    if untried:
        connection.execute(update(webhooks).where(webhooks.c.id.in_(untried)).values(due_at=_in(0)))
    for one in failed:
        gone = one.again_in is None
        row = {"key": one.id, "due": _in(one.again_in or 0), "gone": gone, "why": one.error[:ERROR_CHARS]}
        connection.execute(_FAIL, row)


def _count(connection: Connection) -> tuple[int, int]:
    connection.execute(delete(webhooks).where(webhooks.c.dead == true(), webhooks.c.due_at < _in(-DEAD_KEPT)))
    rows = connection.execute(select(webhooks.c.dead, func.count()).group_by(webhooks.c.dead))
    counts = {bool(dead): count for dead, count in rows}
    return counts.get(False, 0), counts.get(True, 0)


def _in(seconds: float) -> str:
    return timestamp(datetime.now(UTC) + timedelta(seconds=seconds))
