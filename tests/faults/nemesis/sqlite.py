"""Faults of SQLite's file, and of the disk that it lies on."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress

import trio

from tests.faults.nemesis.field import EVERY, Field, blocking

BUSY_SECONDS = 6.0  # longer than chatd waits for SQLite's lock


async def lock(field: Field) -> None:
    """A foreign program begins to write and takes its time: longer than chatd waits."""

    def hold() -> None:
        with closing(field.cluster.connect_sqlite()) as other:
            other.execute("BEGIN IMMEDIATE")
            trio.from_thread.run(trio.sleep, max(field.seconds, BUSY_SECONDS))
            other.execute("ROLLBACK")

    await blocking(hold)


async def disk_full(field: Field) -> None:
    """Nothing fits on the disk any more; then it does again."""
    ballast = field.cluster.disk / "ballast"

    def fill() -> None:
        with suppress(sqlite3.Error), closing(field.cluster.connect_sqlite()) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else its WAL has room for some seconds
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    ends = trio.current_time() + field.seconds
    while trio.current_time() < ends:
        await blocking(fill)  # again: what was given back has made room
        await trio.sleep(EVERY)
    ballast.unlink()
    if not await blocking(field.cluster.sound):
        field.notes.append("the database is not sound")
        field.cluster.nodes[0].ended += 1
