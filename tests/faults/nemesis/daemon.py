"""Faults of chatd itself, and of what its machine gives it."""

from __future__ import annotations

import resource
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from tests.faults.cluster import Cluster, Node
from tests.faults.nemesis.field import EVERY, Field, blocking, strikes

KILL_EVERY = 3.0  # seconds from one kill to the next, the time to be back included
TOGETHER = 0.25  # how often all nodes but one are killed together
SPARE_DESCRIPTORS = 3
HAMMERING = 40  # connections that want to be accepted while there is no descriptor
CLOCK_STEPS = (3600, -3600, 0)  # seconds


async def calm(field: Field) -> None:
    await trio.sleep(field.seconds)


async def reload(field: Field) -> None:
    """SIGHUP again and again: the configuration is read anew, and nobody notices."""
    async for _ in strikes(field, every=EVERY):
        for node in field.cluster.nodes:
            node.signal(signal.SIGHUP)


async def backup(field: Field) -> None:
    """No fault at all, they say. Each copy must be whole, and of every conversation a prefix."""
    (node,) = field.cluster.nodes
    async for number in strikes(field, every=EVERY):
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


async def kill(field: Field) -> None:
    """SIGKILL, and started again at once; of several nodes by turns, now and then all but one together."""
    nodes = field.cluster.nodes
    ends = trio.current_time() + field.seconds
    kills = struck = 0
    while struck == 0 or trio.current_time() + KILL_EVERY / 2 < ends:
        next_ = trio.current_time() + KILL_EVERY
        await trio.sleep(field.dice.uniform(0.2, KILL_EVERY / 2))
        together = max(1, len(nodes) - 1) if field.dice.random() < TOGETHER else 1
        victims = [nodes[(struck + number) % len(nodes)] for number in range(together)]
        for node in victims:
            await blocking(node.kill)
        for node in victims:
            await blocking(node.start)
        struck += 1
        kills += len(victims)
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
    with _closing_all() as knocking:
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


@contextmanager
def _closing_all() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


def _open_files(node: Node) -> int:
    return max(int(path.name) for path in Path(f"/proc/{node.pid}/fd").iterdir()) + 1
