"""SQLite's file goes back in time: an older copy of it takes its place, and the posts go on from there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import trio

from tests.faults.contents import contents, heads, of_sqlite
from tests.faults.history import Past
from tests.faults.nemesis.field import EVERY, Field, blocking

ROUND = 5.0  # seconds from one time to the next, about
AHEAD = (1.0, 2.0)  # seconds of posts between the copy and its return, and after that
NOTICED = 12.0  # seconds that a running chatd may take to notice: its sweep comes every 10
KILLED = 0.5  # how often it is killed; else it is stopped


async def rollback(field: Field) -> None:
    """chatd is killed or stopped, the copy is put back, and chatd starts again.

    Clients come back before and after the new history has passed what they have.
    """
    rounds = max(1, round(field.seconds / ROUND))
    node = field.cluster.nodes[0]
    for _ in range(rounds):
        async with _back_in_time(field) as put_back:
            await blocking(node.kill if field.dice.random() < KILLED else node.stop)
            await put_back()
            await blocking(node.start)
    field.notes.append(f"{rounds} times")


async def rollback_live(field: Field) -> None:
    """The copy is put back under the running chatd: it must notice, and tell all who are connected."""
    began = trio.current_time()
    rounds = 0
    while rounds == 0 or trio.current_time() + NOTICED < began + field.seconds:
        async with _back_in_time(field) as put_back:
            await put_back()
            back = trio.current_time()
            as_copied = await blocking(heads, field.cluster.rows)
            while await blocking(heads, field.cluster.rows) == as_copied:
                if trio.current_time() > back + NOTICED:
                    field.troubles.append(f"rollback-live: not noticed within {NOTICED:.0f} s")
                    break
                await trio.sleep(EVERY)
        rounds += 1
        field.notes.append(f"noticed within {trio.current_time() - back:.1f} s")


class _PutBack:
    """A copy of the database, and what it holds."""

    def __init__(self, field: Field) -> None:
        self._cluster = field.cluster
        number = len(field.past)
        self.copy, self.aside = (self._cluster.disk / f"{name}-{number}.db" for name in ("copy", "aside"))

    async def __call__(self) -> None:
        await blocking(self._cluster.put_back, self.copy, self.aside)


@asynccontextmanager
async def _back_in_time(field: Field) -> AsyncIterator[_PutBack]:
    """A copy is taken and posts go on. The block must put it back; after it the new history has begun."""
    put_back = _PutBack(field)
    await blocking(field.cluster.copy_sqlite, put_back.copy)
    await trio.sleep(field.dice.uniform(*AHEAD))
    async with field.workload.going_back():
        at = monotonic()
        yield put_back
        held = await blocking(contents, of_sqlite(put_back.aside))
        copied = await blocking(contents, of_sqlite(put_back.copy))
        field.past.append(Past(at, monotonic(), held, copied))
    await trio.sleep(field.dice.uniform(*AHEAD))
