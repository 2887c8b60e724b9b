"""The faults: each does its harm for a while and then mends everything that it broke.

A fault is a coroutine function of the `Field`: the cluster, the clients, how long, and the dice. `FAULTS` has
them by name, with the clusters that they are for.
"""

from __future__ import annotations

import random

import trio

from tests.faults.nemesis.clients import dark, half_open, slow_clients, slow_link
from tests.faults.nemesis.daemon import backup, calm, clock, descriptors, freeze, kill, reload, restart
from tests.faults.nemesis.failover import pg_failover, pg_failover_lagging
from tests.faults.nemesis.field import Fault, Field
from tests.faults.nemesis.postgres import postgres_crash, postgres_cut, postgres_freeze
from tests.faults.nemesis.redis import (
    redis_cut,
    redis_empty,
    redis_flush,
    redis_freeze,
    redis_kill,
    redis_pause,
)
from tests.faults.nemesis.rollback import rollback, rollback_live
from tests.faults.nemesis.sqlite import disk_full, lock

ONE = frozenset(["sqlite"])
SMALL = frozenset(["small-disk"])
TWO = frozenset(["two"])
THREE = frozenset(["three"])
STANDBY = frozenset(["standby"])

# The first of each cluster's is the calm: what the others are measured against.
FAULTS: dict[str, tuple[Fault, frozenset[str]]] = {
    "calm": (calm, ONE | SMALL | TWO | THREE | STANDBY),
    "reload": (reload, ONE),
    "backup": (backup, ONE),
    "kill": (kill, ONE | TWO | THREE),
    "restart": (restart, ONE | TWO | THREE),
    "freeze": (freeze, ONE | TWO | THREE),
    "descriptors": (descriptors, ONE | TWO),
    "clock": (clock, ONE | TWO),
    "slow-clients": (slow_clients, ONE | TWO),
    "slow-link": (slow_link, ONE | TWO),
    "half-open": (half_open, ONE | TWO),
    "dark": (dark, ONE | TWO),
    "lock": (lock, ONE),
    "rollback": (rollback, ONE),
    "rollback-live": (rollback_live, ONE),
    "disk-full": (disk_full, SMALL),
    "redis-kill": (redis_kill, TWO),
    "redis-empty": (redis_empty, TWO),
    "redis-flush": (redis_flush, TWO),
    "redis-cut": (redis_cut, TWO),
    "redis-pause": (redis_pause, TWO),
    "redis-freeze": (redis_freeze, TWO),
    "postgres-crash": (postgres_crash, TWO),
    "postgres-cut": (postgres_cut, TWO),
    "postgres-freeze": (postgres_freeze, TWO),
    "pg-failover": (pg_failover, STANDBY),
    "pg-failover-lagging": (pg_failover_lagging, STANDBY),
}

# Two that would have to hold the same process cannot strike at once.
_TARGETS = {
    "kill": "chatd", "restart": "chatd", "freeze": "chatd", "descriptors": "chatd", "clock": "chatd",
    "rollback": "chatd",
    "slow-clients": "clients", "half-open": "clients", "dark": "clients",
    "lock": "database", "disk-full": "database",
    "postgres-crash": "database", "postgres-cut": "database", "postgres-freeze": "database",
    "redis-kill": "redis", "redis-empty": "redis", "redis-flush": "redis", "redis-cut": "redis",
    "redis-pause": "redis", "redis-freeze": "redis",
}  # fmt: skip


def faults_of(kind: str) -> list[str]:
    return [name for name, (_, kinds) in FAULTS.items() if kind in kinds]


def fits(name: str, kind: str) -> bool:
    """Whether a fault, or a pair, is one for this cluster."""
    return all(kind in FAULTS[one][1] for one in name.split(" + "))


def pairs_of(kind: str, dice: random.Random, count: int) -> list[str]:
    """Pairs of faults of different things, as `one + other`."""
    names = [name for name in faults_of(kind) if name in _TARGETS]
    found: list[str] = []
    while len(found) < count and len({_TARGETS[name] for name in names}) > 1:
        one, other = dice.sample(names, 2)
        if _TARGETS[one] != _TARGETS[other]:
            found.append(f"{one} + {other}")
    return found


async def strike(name: str, field: Field) -> None:
    """One fault, or two at once."""
    async with trio.open_nursery() as nursery:
        for one in name.split(" + "):
            nursery.start_soon(FAULTS[one][0], field)
