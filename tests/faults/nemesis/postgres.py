"""Faults of PostgreSQL."""

from __future__ import annotations

import trio

from tests.faults.nemesis.field import EVERY, Field, blocking, strikes


async def postgres_crash(field: Field) -> None:
    """`pg_ctl -m immediate`: it ends as in a crash, and recovers from its log at the next start."""
    server = field.cluster.postgres
    assert server is not None
    async for _ in strikes(field, every=max(3.0, field.seconds / 3)):
        await blocking(server.crash)
        await trio.sleep(field.dice.uniform(0, 1))
        await blocking(server.start)


async def postgres_freeze(field: Field) -> None:
    assert field.cluster.postgres is not None
    await blocking(field.cluster.postgres.pause)
    try:
        await trio.sleep(field.seconds)
    finally:
        field.cluster.postgres.resume()


async def postgres_cut(field: Field) -> None:
    """An administrator ends the sessions, whatever they are in the middle of."""
    async for _ in strikes(field, every=EVERY):
        await blocking(
            field.cluster.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chatd'",
        )
