"""Faults of Redis."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import Any

import redis
import trio

from tests.faults.nemesis.field import EVERY, Field, blocking, strikes


async def redis_kill(field: Field) -> None:
    assert field.cluster.redis is not None
    await blocking(field.cluster.redis.kill)
    await trio.sleep(field.seconds)
    await blocking(field.cluster.redis.start)


async def redis_empty(field: Field) -> None:
    """Killed, and back at once without what it held."""
    server = field.cluster.redis
    assert server is not None
    async for _ in strikes(field, every=max(2.0, field.seconds / 4)):
        server.durable = False
        await blocking(server.kill)
        await blocking(server.start)
    server.durable = True


async def redis_flush(field: Field) -> None:
    async for client in _redis_strikes(field):
        with suppress(redis.RedisError):
            await blocking(client.flushall)


async def redis_cut(field: Field) -> None:
    """The connections of all subscribers and readers are ended, again and again."""
    async for client in _redis_strikes(field):
        for kind in ("pubsub", "normal"):
            with suppress(redis.RedisError):
                await blocking(client.execute_command, "CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


async def redis_pause(field: Field) -> None:
    """It takes no command for the time, and then all of them."""
    assert field.cluster.redis is not None
    with closing(redis.Redis.from_url(field.cluster.redis.url, protocol=2)) as client:
        await blocking(client.client_pause, round(field.seconds * 1000), True)
        await trio.sleep(field.seconds)


async def redis_freeze(field: Field) -> None:
    assert field.cluster.redis is not None
    await blocking(field.cluster.redis.pause)
    try:
        await trio.sleep(field.seconds)
    finally:
        field.cluster.redis.resume()


async def _redis_strikes(field: Field) -> Any:
    assert field.cluster.redis is not None
    with closing(redis.Redis.from_url(field.cluster.redis.url, protocol=2)) as client:
        async for _ in strikes(field, every=EVERY):
            yield client
