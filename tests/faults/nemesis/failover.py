"""PostgreSQL's primary dies and its standby takes over: with everything, or with what it had received."""

from __future__ import annotations

import trio

from tests.faults.contents import contents, of_postgres
from tests.faults.history import Conversation
from tests.faults.nemesis.backwards import AHEAD, back_in_time
from tests.faults.nemesis.field import Field, blocking
from tests.replication import ReplicatedServer, Replication
from tests.services import free_port

ROUND = 8.0  # seconds from one failover to the next, about
REPLAYED = "SELECT pg_last_wal_receive_lsn() IS NULL OR pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()"


async def pg_failover(field: Field) -> None:
    """Replication is synchronous: whatever was acknowledged must be there, and nobody has to start over."""
    replication = _replication(field)
    rounds = max(1, round(field.seconds / ROUND))
    for _ in range(rounds):
        await blocking(replication.make_synchronous)
        await trio.sleep(field.dice.uniform(*AHEAD))
        await blocking(_take_over, field)
        await trio.sleep(field.dice.uniform(*AHEAD))
        await blocking(_replace_the_dead, field)
    field.notes.append(f"{rounds} times")


async def pg_failover_lagging(field: Field) -> None:
    """The standby has not received the last seconds: they are lost, and who has something of them is told."""
    replication = _replication(field)
    rounds = max(1, round(field.seconds / ROUND))
    for _ in range(rounds):
        await blocking(replication.standby.hold)
        await trio.sleep(field.dice.uniform(*AHEAD))
        async with back_in_time(field) as past:
            await blocking(replication.standby.wait_for, REPLAYED)
            past.copy = await blocking(contents, of_postgres(replication.standby.url))
            await blocking(_take_over, field)
            past.held = await blocking(_contents_of_the_dead, replication.standby)
        await blocking(_replace_the_dead, field)
    field.notes.append(f"{rounds} times")


def _replication(field: Field) -> Replication:
    assert field.cluster.replication is not None
    return field.cluster.replication


def _take_over(field: Field) -> None:
    """As a cluster manager does it. The dead one is the replication's standby then."""
    replication = _replication(field)
    replication.primary.kill()
    # What comes with a copy of a synchronous primary: the new one has no standby that it could wait for.
    replication.standby.execute("ALTER SYSTEM RESET synchronous_standby_names")
    replication.standby.execute("SELECT pg_reload_conf()")
    replication.standby.promote()
    replication.primary, replication.standby = replication.standby, replication.primary
    field.cluster.postgres = replication.primary


def _contents_of_the_dead(server: ReplicatedServer) -> list[Conversation]:
    """Read what the killed primary held, where chatd does not find it."""
    known, server.port = server.port, free_port()
    server.start()
    try:
        return contents(of_postgres(server.url))
    finally:
        server.stop()
        server.port = known


def _replace_the_dead(field: Field) -> None:
    """Another standby, at the address of the one that died, with a copy of the primary as it is."""
    replication = _replication(field)
    fresh = field.cluster.new_standby(replication.primary, replication.standby.port)
    replication.standby.close()
    replication.standby = fresh
    fresh.start()
    replication.wait_for_streaming()
