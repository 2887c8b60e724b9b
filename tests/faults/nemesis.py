"""The faults: each does its harm for a while and then mends everything that it broke.

A fault is a coroutine function of the `Field`: the cluster, the clients, how long, and the dice. `FAULTS` has
them by name, with the clusters that they are for.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis
import trio
from msgspec import Struct

from tests.faults.cluster import Cluster, Node

EVERY = 0.25  # seconds between two blows of a fault that strikes again and again
KILL_EVERY = 3.0  # seconds from one kill to the next, the time to be back included
HALF_OPEN_SOURCE = "127.0.0.2"  # where the second crowd connects from
SPARE_DESCRIPTORS = 3
HAMMERING = 40  # connections that want to be accepted while there is no descriptor
CLOCK_STEPS = (3600, -3600, 0)  # seconds
BUSY_SECONDS = 6.0  # longer than chatd waits for SQLite's lock


class Field(Struct):
    """Where a fault strikes. The crowd with `crowd_pid` is the second half of the clients."""

    cluster: Cluster
    crowd_pid: int
    seconds: float
    dice: random.Random
    notes: list[str]  # what was done, for the report


Fault = Callable[[Field], Awaitable[None]]


async def blocking(work: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(work, *arguments, limiter=trio.CapacityLimiter(1))


async def calm(field: Field) -> None:
    await trio.sleep(field.seconds)


async def reload(field: Field) -> None:
    """SIGHUP again and again: the configuration is read anew, and nobody notices."""
    async for _ in _strikes(field, every=EVERY):
        for node in field.cluster.nodes:
            node.signal(signal.SIGHUP)


async def backup(field: Field) -> None:
    """No fault at all, they say. Each copy must be whole, and of every conversation a prefix."""
    (node,) = field.cluster.nodes
    async for number in _strikes(field, every=EVERY):
        copy = field.cluster.disk / f"copy-{number}.db"
        done = await blocking(node.command, "backup", str(copy))
        if done.returncode:
            raise RuntimeError(f"no backup: {done.stderr}")
        await blocking(_check_copy, copy, field.cluster)
        copy.unlink()


def _check_copy(copy: Path, cluster: Cluster) -> None:
    log = "SELECT conversation_id, seq, kind, message_id FROM chat_changes ORDER BY conversation_id, seq"
    with closing(sqlite3.connect(copy)) as theirs, closing(cluster.connect_sqlite()) as ours:
        heads = dict(theirs.execute("SELECT id, last_seq FROM chat_conversations"))
        copied, live = (connection.execute(log).fetchall() for connection in (theirs, ours))
    wanted = [row for row in live if row[1] <= heads.get(row[0], 0)]
    if not heads or copied != wanted or len(copied) != sum(heads.values()):
        raise RuntimeError(f"{copy} is no prefix of what was committed")


# chatd itself.


async def kill(field: Field) -> None:
    """SIGKILL, and started again at once; with two nodes by turns."""
    ends = trio.current_time() + field.seconds
    kills = 0
    while kills == 0 or trio.current_time() + KILL_EVERY / 2 < ends:
        next_ = trio.current_time() + KILL_EVERY
        await trio.sleep(field.dice.uniform(0.2, KILL_EVERY / 2))
        node = field.cluster.nodes[kills % len(field.cluster.nodes)]
        await blocking(node.kill)
        kills += 1
        await blocking(node.start)
        await trio.sleep_until(min(next_, max(ends, trio.current_time())))
    field.notes.append(f"{kills} kills")


async def restart(field: Field) -> None:
    """SIGTERM, and started again when it has ended; it must end well."""
    ends = trio.current_time() + field.seconds
    restarts = 0
    while restarts == 0 or trio.current_time() + KILL_EVERY / 2 < ends:
        node = field.cluster.nodes[restarts % len(field.cluster.nodes)]
        await trio.sleep(field.dice.uniform(0.2, 1.0))
        if (code := await blocking(node.stop)) != 0:
            node.ended += 1
            field.notes.append(f"exit code {code}")
        await blocking(node.start)
        restarts += 1
    field.notes.append(f"{restarts} restarts")


async def freeze(field: Field) -> None:
    """SIGSTOP: the kernel takes connections and bytes for it, and nobody answers."""
    node = field.dice.choice(field.cluster.nodes)
    node.signal(signal.SIGSTOP)
    try:
        await trio.sleep(field.seconds)
    finally:
        node.signal(signal.SIGCONT)


async def descriptors(field: Field) -> None:
    """The limit of open files is lowered to what is open, while many knock."""
    node = field.dice.choice(field.cluster.nodes)
    before = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    with closing_all() as knocking:
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (_open_files(node) + SPARE_DESCRIPTORS, before[1]))
        try:
            for number in range(HAMMERING):
                with suppress(OSError):
                    port = node.hub_port if number % 2 else node.api_port
                    knocking.append(await blocking(partial(socket.create_connection, ("127.0.0.1", port), 2)))
            await trio.sleep(field.seconds)
        finally:
            resource.prlimit(node.pid, resource.RLIMIT_NOFILE, before)


async def clock(field: Field) -> None:
    """The wall clock steps an hour ahead and back again, under the running daemon."""
    for node in field.cluster.nodes:
        node.faked = True
        await blocking(node.stop)
        await blocking(node.start)
    for step in CLOCK_STEPS:
        for node in field.cluster.nodes:
            node.step_clock(step)
        await trio.sleep(field.seconds / len(CLOCK_STEPS))
    for node in field.cluster.nodes:
        node.faked = False
        await blocking(node.stop)
        await blocking(node.start)


# Clients.


async def slow_clients(field: Field) -> None:
    """Half of the clients are stopped: they read nothing and answer nothing, and then everything at once."""
    os.kill(field.crowd_pid, signal.SIGSTOP)
    try:
        await trio.sleep(field.seconds)
    finally:
        os.kill(field.crowd_pid, signal.SIGCONT)


async def half_open(field: Field) -> None:
    """No packet passes between chatd and half of the clients, and neither is told."""
    rules = f"""
        table inet chatd_faults {{
            chain drop_some {{
                type filter hook output priority 0
                ip saddr {HALF_OPEN_SOURCE} drop
                ip daddr {HALF_OPEN_SOURCE} drop
            }}
        }}
    """
    await trio.run_process(["nft", "-f", "-"], stdin=rules.encode())
    try:
        await trio.sleep(field.seconds)
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process(["nft", "delete", "table", "inet", "chatd_faults"])


# SQLite.


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


# Redis.


async def redis_kill(field: Field) -> None:
    assert field.cluster.redis is not None
    await blocking(field.cluster.redis.kill)
    await trio.sleep(field.seconds)
    await blocking(field.cluster.redis.start)


async def redis_empty(field: Field) -> None:
    """Killed, and back at once without what it held."""
    server = field.cluster.redis
    assert server is not None
    async for _ in _strikes(field, every=max(2.0, field.seconds / 4)):
        server.durable = False
        await blocking(server.kill)
        await blocking(server.start)
    server.durable = True


async def redis_flush(field: Field) -> None:
    async for client in _redis_strikes(field):
        await blocking(client.flushall)


async def redis_cut(field: Field) -> None:
    """The connections of all subscribers and readers are ended, again and again."""
    async for client in _redis_strikes(field):
        for kind in ("pubsub", "normal"):
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


# PostgreSQL.


async def postgres_crash(field: Field) -> None:
    """`pg_ctl -m immediate`: it ends as in a crash, and recovers from its log at the next start."""
    server = field.cluster.postgres
    assert server is not None
    async for _ in _strikes(field, every=max(3.0, field.seconds / 3)):
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
    async for _ in _strikes(field, every=EVERY):
        await blocking(
            field.cluster.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chatd'",
        )


# Helpers.


@contextmanager
def closing_all() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


async def _strikes(field: Field, *, every: float) -> Any:
    """Once at least, until the time is over."""
    ends = trio.current_time() + field.seconds
    count = 0
    while count == 0 or trio.current_time() < ends:
        yield count
        count += 1
        await trio.sleep(every * field.dice.uniform(0.5, 1.0))
    field.notes.append(f"{count} times")


async def _redis_strikes(field: Field) -> Any:
    assert field.cluster.redis is not None
    with closing(redis.Redis.from_url(field.cluster.redis.url, protocol=2)) as client:
        async for _ in _strikes(field, every=EVERY):
            with suppress(redis.RedisError):
                yield client


def _open_files(node: Node) -> int:
    return max(int(path.name) for path in Path(f"/proc/{node.pid}/fd").iterdir()) + 1


ONE = frozenset(["sqlite"])
SMALL = frozenset(["small-disk"])
TWO = frozenset(["two"])

# The first of each cluster's is the calm: what the others are measured against.
FAULTS: dict[str, tuple[Fault, frozenset[str]]] = {
    "calm": (calm, ONE | SMALL | TWO),
    "reload": (reload, ONE),
    "backup": (backup, ONE),
    "kill": (kill, ONE | TWO),
    "restart": (restart, ONE | TWO),
    "freeze": (freeze, ONE | TWO),
    "descriptors": (descriptors, ONE | TWO),
    "clock": (clock, ONE | TWO),
    "slow-clients": (slow_clients, ONE | TWO),
    "half-open": (half_open, ONE | TWO),
    "lock": (lock, ONE),
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
}

# Two that would have to hold the same process cannot strike at once.
_TARGETS = {
    "kill": "chatd", "restart": "chatd", "freeze": "chatd", "descriptors": "chatd", "clock": "chatd",
    "slow-clients": "clients", "half-open": "clients",
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
