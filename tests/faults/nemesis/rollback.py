"""SQLite's file goes back in time: an older copy of it takes its place, and the posts go on from there."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.faults.contents import contents, of_sqlite
from tests.faults.history import Past
from tests.faults.nemesis.backwards import AHEAD, back_in_time
from tests.faults.nemesis.field import EVERY, Field, blocking

ROUND = 6.0  # seconds from one time to the next, about
NOTICED = (
    4.0  # seconds that chatd may take to notice that its file was replaced: it looks every 2, and at a commit
)
KILLED = 0.5  # how often it is killed; else it is stopped


async def rollback(field: Field) -> None:
    """chatd is killed or stopped, the copy is put back, and chatd starts again."""
    node = field.cluster.nodes[0]
    rounds = max(1, round(field.seconds / ROUND))
    for _ in range(rounds):
        copy, aside = await _copy(field)
        async with back_in_time(field) as past:
            await blocking(node.kill if field.dice.random() < KILLED else node.stop)
            await blocking(field.cluster.put_back, copy, aside)
            await blocking(node.start)
            await _say_what_was_held(past, copy, aside)
    field.notes.append(f"{rounds} times")


async def rollback_live(field: Field) -> None:
    """The copy is put back under the running chatd. It must notice and end; its manager starts it again."""
    node = field.cluster.nodes[0]
    rounds = max(1, round(field.seconds / ROUND))
    for _ in range(rounds):
        copy, aside = await _copy(field)
        async with back_in_time(field) as past:
            await blocking(field.cluster.put_back, copy, aside)
            began = trio.current_time()
            while node.exit_code is None and trio.current_time() < began + NOTICED:
                await trio.sleep(EVERY)
            if node.exit_code is None:
                field.troubles.append(f"rollback-live: not noticed within {NOTICED:.0f} s")
                await blocking(node.kill)
            await blocking(node.start)
            await _say_what_was_held(past, copy, aside)
    field.notes.append(f"{rounds} times")


async def _copy(field: Field) -> tuple[Path, Path]:
    """A copy of the database, behind which posts have gone on; and where the database itself is to be put."""
    copy, aside = (field.cluster.disk / f"{name}-{len(field.past)}.db" for name in ("copy", "aside"))
    await blocking(field.cluster.copy_sqlite, copy)
    await trio.sleep(field.dice.uniform(*AHEAD))
    return copy, aside


async def _say_what_was_held(past: Past, copy: Path, aside: Path) -> None:
    past.held = await blocking(contents, of_sqlite(aside))
    past.copy = await blocking(contents, of_sqlite(copy))
