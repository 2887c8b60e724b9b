"""Examines Redis for `chatd doctor`. It writes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import redis

from chatd.bus import rights
from chatd.bus.client import LOST, client_of
from chatd.config import Redis
from chatd.core.errors import OperatorError

SCANS, SCANNED = 500, 1000  # keys to look at: a look shall not take long where there are many
PINGS = 20  # pings to measure; their median counts


@dataclass(frozen=True)
class Found:
    """The result of `look`: `ping` in seconds, `ahead` the seconds by which Redis's clock is ahead of ours,
    `memory` and `most_memory` (0: no limit) in bytes, `policy` its eviction policy.
    """

    version: str
    ping: float
    ahead: float
    policy: str
    memory: int
    most_memory: int
    persists: bool
    replica: bool


class Refused(OperatorError):
    """Redis answers, and does not want this user, this password or this database."""


def look(config: Redis) -> Found:
    """Examine Redis. Raises OperatorError if it does not answer, Refused if it lets chatd not in."""
    client = client_of(config)
    try:
        return _look(client)
    except (*LOST, ValueError) as error:
        raise _told(error) from error
    finally:
        client.close()


def missing_rights(config: Redis) -> list[str]:
    """See `rights.missing`. Raises OperatorError, Refused."""
    try:
        return rights.missing(config)
    except (*LOST, ValueError) as error:
        raise _told(error) from error


def _told(error: Exception) -> OperatorError:
    refused = isinstance(error, redis.ResponseError | redis.AuthenticationError)
    return (Refused if refused else OperatorError)(str(error).splitlines()[0].rstrip("."))


def streams_like(config: Redis, pattern: str) -> list[str]:
    """The names of streams that match, of the first half a million keys. Raises OperatorError."""
    client = client_of(config)
    found: set[str] = set()
    cursor: Any = 0
    try:
        for _ in range(SCANS):
            reply: Any = client.scan(cursor, match=pattern, count=SCANNED, _type="stream")
            cursor, names = reply
            found |= {name.decode(errors="replace") for name in names}
            if not cursor:
                break
    except (*LOST, ValueError) as error:
        raise OperatorError(str(error)) from error
    finally:
        client.close()
    return sorted(found)


def _look(client: redis.Redis) -> Found:
    client.ping()
    info: Any = client.info("everything")
    before = time.time()
    seconds, micros = client.time()
    ahead = seconds + micros / 1e6 - (before + time.time()) / 2
    return Found(
        version=info["redis_version"],
        ping=median(_ping(client) for _ in range(PINGS)),
        ahead=ahead,
        policy=info.get("maxmemory_policy", ""),
        memory=info.get("used_memory", 0),
        most_memory=info.get("maxmemory", 0),
        persists=bool(info.get("aof_enabled")),
        replica=info.get("role") == "slave",
    )


def _ping(client: redis.Redis) -> float:
    begun = time.perf_counter()
    client.ping()
    return time.perf_counter() - begun
