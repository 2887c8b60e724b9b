"""What the backend is told of presence comes true, whoever notices: nodes on one database, and their ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import event as events
from sqlalchemy import select, text

from chatd.chat.leases import BEAT, LOOKS, Leases, Life
from chatd.chat.presence import ROOMS, USERS, Presence
from chatd.chat.presence_webhooks import PresenceWebhooks
from chatd.config import Database
from chatd.core.errors import Unavailable
from chatd.store import schema
from chatd.store.database import Store, open_store
from chatd.store.queues.presence import SLICE, Change, Lease, LeaseLost, PresenceTable, Seen
from tests.backend import Backend as HttpBackend
from tests.backend import serving
from tests.client import login
from tests.conftest import Daemons
from tests.services import RedisServer
from tests.test_store import bench

EVENTS = ("user.online", "user.offline", "room.occupied", "room.vacated")
HASTE = 20  # how much faster everything is here


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    one = open_store(Database(url=database_url))
    yield one
    one.close()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubts are told in whole seconds: they are due at once here."""
    for name, seconds in {"DEBOUNCE": 0.0, "AFRESH": 0.0, "TICK": 0.5 / HASTE, "BEAT": BEAT / HASTE}.items():
        monkeypatch.setattr(f"chatd.chat.presence_webhooks.{name}", seconds)


class Backend:
    """What it would believe, had it got each webhook that was written."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def told(self) -> list[tuple[str, int, int]]:
        """(event, id, version)"""
        with self._store._writing.connect() as connection:
            rows = connection.execute(select(schema.webhooks.c.event, schema.webhooks.c.body).order_by("id"))
            found = [(event, json.loads(body)["data"]) for event, body in rows]
        return [(e, data.get("user_id", data.get("conversation_id")), data["version"]) for e, data in found]

    @property
    def online(self) -> set[int]:
        """By the versions, in whatever order they come."""
        latest: dict[int, tuple[int, bool]] = {}
        for event, id, version in self.told():
            if event.startswith("user."):
                assert latest.get(id, (0, False))[0] != version
                latest[id] = max(latest.get(id, (0, False)), (version, event == "user.online"))
        return {id for id, (_, online) in latest.items() if online}

    async def comes_to_believe(self, *ids: int) -> None:
        with trio.move_on_after(10):
            while self.online != set(ids):
                await trio.sleep(0.01)
        assert self.online == set(ids)


class Delivery:
    full = False

    def wake(self) -> None:
        pass


class Node:
    def __init__(self, store: Store, name: str, *, alone: bool = False, events: Any = EVENTS) -> None:
        leases, self.delivery = Leases(), Delivery()
        self.presence = Presence(name, None if alone else lambda signal: None, leases.life)
        self.attendance = PresenceWebhooks(store.presence, self.presence, leases, events, self.delivery)
        self.presence.on_own_change(self.attendance.note)
        self.stop = trio.Event()
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            await self.attendance.run(self.stop)

    def kill(self) -> None:
        self.scope.cancel()


class Cluster:
    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self._store, self._nursery = store, nursery
        self.backend = Backend(store)

    def start(self, name: str, **more: Any) -> Node:
        node = Node(self._store, name, **more)
        self._nursery.start_soon(node.run)
        return node


@pytest.fixture
async def cluster(store: Store, nursery: trio.Nursery) -> Cluster:
    return Cluster(store, nursery)


async def test_two_nodes_that_write_the_same_users_do_not_wait_for_each_other(
    store: Store, database_url: str
) -> None:
    """Users who move from one node to the other change on both, and are due at different moments there."""
    other = open_store(Database(url=database_url))

    async def write(table: PresenceTable, number: int) -> None:
        lease = Lease(f"lease-{number}", f"node-{number}")
        for _ in range(50):
            changes = [Change((USERS, user), True, 9 + (user + number) % 2) for user in range(SLICE)]
            await table.turn(lease, changes, None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, store.presence, 0)
        nursery.start_soon(write, other.presence, 1)
    other.close()
    with store._writing.connect() as connection:
        moments = connection.execute(select(schema.attendance.c.due_at).order_by("id")).scalars().all()
    assert len(moments) == SLICE and len(set(moments)) <= 2 and None not in moments


async def test_users_who_come_and_go_on_several_nodes(cluster: Cluster) -> None:
    one, other = cluster.start("one"), cluster.start("other")
    one.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 2)
    one.presence.arrive(ROOMS, 7)
    await cluster.backend.comes_to_believe(1, 2)
    one.presence.leave(USERS, 1)
    other.presence.leave(USERS, 2)
    one.presence.leave(ROOMS, 7)
    await cluster.backend.comes_to_believe(1)
    other.presence.leave(USERS, 1)
    await cluster.backend.comes_to_believe()
    rooms = [event for event, id, _ in cluster.backend.told() if event.startswith("room.") and id == 7]
    assert rooms == ["room.occupied", "room.vacated"]


async def test_two_nodes_that_lose_a_user_together_tell_it(cluster: Cluster) -> None:
    """Neither hears of the other's loss before its own."""
    nodes = [cluster.start("one"), cluster.start("other")]
    users = range(1, 40)
    for node in nodes:
        for user in users:
            node.presence.arrive(USERS, user)
    await cluster.backend.comes_to_believe(*users)
    for user in users:
        for node in nodes:
            node.presence.leave(USERS, user)
        await trio.sleep(0.005)
    await cluster.backend.comes_to_believe()


async def test_a_killed_node_s_users_go_offline_unless_they_are_elsewhere(cluster: Cluster) -> None:
    one, other = cluster.start("one"), cluster.start("other")
    one.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(1, 2)
    other.kill()
    await cluster.backend.comes_to_believe(1)
    assert one.presence.life("other") is Life.OVER
    cluster.start("other again").presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(1, 2)


async def test_a_single_node_that_is_killed_is_made_up_for_by_its_next_start(cluster: Cluster) -> None:
    before = cluster.start("before", alone=True)
    for user in range(1, 1201):  # more than a slice
        before.presence.arrive(USERS, user)
    await cluster.backend.comes_to_believe(*range(1, 1201))
    before.kill()
    cluster.start("after", alone=True).presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(2)


@pytest.mark.parametrize("alone", [True, False])
async def test_a_graceful_stop_leaves_nothing_untold(cluster: Cluster, alone: bool) -> None:
    one = cluster.start("one", alone=alone)
    one.presence.arrive(USERS, 1)
    await cluster.backend.comes_to_believe(1)
    one.presence.leave(USERS, 1)
    one.stop.set()
    await one.attendance.finished.wait()
    cluster.start("other", alone=alone)
    await cluster.backend.comes_to_believe()


async def test_a_node_that_was_frozen_comes_back(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = cluster.start("one"), cluster.start("other")
    one.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(1, 2)
    thawed = trio.Event()
    turn = other.attendance._turn

    async def frozen() -> Any:
        await thawed.wait()
        return await turn()

    monkeypatch.setattr(other.attendance, "_turn", frozen)
    await cluster.backend.comes_to_believe(1)
    thawed.set()
    await cluster.backend.comes_to_believe(1, 2)
    other.presence.leave(USERS, 2)
    await cluster.backend.comes_to_believe(1)


async def test_a_database_that_is_away_makes_nobody_go_offline(
    cluster: Cluster, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = cluster.start("one"), cluster.start("other")
    one.presence.arrive(USERS, 1)
    other.presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(1, 2)

    async def away(*_: Any) -> Any:
        raise Unavailable

    with monkeypatch.context() as patch:
        patch.setattr(store.presence, "_in_thread", away)
        one.presence.leave(USERS, 1)
        other.presence.arrive(USERS, 3)
        await trio.sleep((LOOKS + 3) * BEAT / HASTE)
    await cluster.backend.comes_to_believe(2, 3)
    assert [event for event, id, _ in cluster.backend.told() if id == 2] == ["user.online"]


async def test_an_answer_that_was_lost_costs_no_lease(
    store: Store, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cluster.start("one")
    one.presence.arrive(USERS, 1)
    await cluster.backend.comes_to_believe(1)
    real, lost = store.presence._in_thread, 0

    async def committed_but_not_answered(work: Any, *arguments: Any) -> Any:
        nonlocal lost
        answer = await real(work, *arguments)
        lost += 1
        if lost % 2:
            raise Unavailable
        return answer

    monkeypatch.setattr(store.presence, "_in_thread", committed_but_not_answered)
    lease = one.attendance._lease.name
    one.presence.leave(USERS, 1)
    await cluster.backend.comes_to_believe()
    assert one.attendance._lease.name == lease


async def test_a_database_that_goes_back_is_written_anew(cluster: Cluster, store: Store) -> None:
    one = cluster.start("one")
    one.presence.arrive(USERS, 1)
    one.presence.arrive(USERS, 2)
    await cluster.backend.comes_to_believe(1, 2)
    with store._writing.begin() as connection:
        connection.execute(text("UPDATE chat_nodes SET beat = 1"))
        connection.execute(text("DELETE FROM chat_present WHERE id = 1"))
        connection.execute(text("UPDATE chat_attendance SET told = (id <> 1) WHERE id < 3"))
    one.presence.leave(USERS, 2)
    with trio.fail_after(10):
        while cluster.backend.told()[-1][1] != 2:
            await trio.sleep(0.01)
    await cluster.backend.comes_to_believe(1)


async def test_what_a_full_queue_holds_back_is_told_later(cluster: Cluster) -> None:
    one = cluster.start("one", alone=True)
    one.delivery.full = True
    one.presence.arrive(USERS, 1)
    await trio.sleep(0.3)
    assert cluster.backend.told() == []
    one.delivery.full = False
    await cluster.backend.comes_to_believe(1)


async def test_only_what_is_wanted_is_told(cluster: Cluster) -> None:
    one = cluster.start("one", alone=True, events=["user.online"])
    one.presence.arrive(USERS, 1)
    one.presence.arrive(ROOMS, 1)
    await cluster.backend.comes_to_believe(1)
    one.presence.leave(USERS, 1)
    one.presence.leave(ROOMS, 1)
    await trio.sleep(0.2)
    one.presence.arrive(USERS, 1)
    with trio.fail_after(5):
        while len(cluster.backend.told()) < 2:
            await trio.sleep(0.01)
    assert {(event, id) for event, id, _ in cluster.backend.told()} == {("user.online", 1)}


async def test_versions_grow_whatever_the_clock_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease("l", "n")
    told: list[int] = []

    def announce(place: int, id: int, present: bool, version: int) -> tuple[str, bytes]:
        told.append(version)
        return "user.online", b"{}"

    for present in (True, False, True):
        await store.presence.turn(lease, [Change((USERS, 1), present, 0)], announce)
        monkeypatch.setattr("chatd.store.clock.Clock.milliseconds", 5)  # it was set back
    assert told == [told[0], told[0] + 1, told[0] + 2]


async def test_a_change_waits_and_a_later_one_makes_it_wait_longer(store: Store) -> None:
    lease = Lease("l", "n")
    told: list[bool] = []

    def announce(place: int, id: int, present: bool, version: int) -> None:
        told.append(present)

    def turn(*changes: Change) -> Any:
        return store.presence.turn(lease, changes, announce)

    await turn(Change((USERS, 1), True, 1))
    assert told == []
    await trio.sleep(1.1)
    await turn()
    assert told == [True]
    await turn(Change((USERS, 1), False, 1))
    await turn(Change((USERS, 1), True, 1))  # a tunnel
    await trio.sleep(1.1)
    turned = await turn()
    assert (told, turned.doubts) == ([True], False)


async def test_no_turn_walks_over_everybody_who_was_ever_seen(tmp_path: Path) -> None:
    ran: list[tuple[str, Any]] = []
    async with bench(f"sqlite:///{tmp_path}/chatd.db") as b:
        events.listen(b.store._writing, "before_cursor_execute", lambda *given: ran.append(given[2:4]))
        lease, table = Lease("l", "n"), b.store.presence
        for present in (True, False):
            await table.turn(lease, [Change((USERS, 1), present, 0)], lambda *_: None)
        await table.turn(lease, [Change((USERS, 2), True, 0)], None)
        assert await table.end("l", lease.beat, 0)
        walks = [f"{plan}: {statement}" for statement, values in ran for plan in b.plan(statement, values)
                 if plan.startswith(("SCAN chat_attendance", "SCAN chat_present"))]  # fmt: skip
    assert len(ran) > 10
    assert not walks


async def test_a_lease_that_others_ended_is_lost(store: Store) -> None:
    mine, theirs = Lease("mine", "one"), Lease("theirs", "other")
    await store.presence.turn(mine, [Change((USERS, 1), True, 0)], None)
    turned = await store.presence.turn(theirs, [], None)
    assert turned.others == [Seen("mine", "one", 1)]
    await store.presence.turn(mine, [], None)
    assert await store.presence.end("mine", 1, 0), "it lives: its beat has moved"
    await store.presence.turn(mine, [], None)
    assert await store.presence.end("mine", 3, 0)
    with pytest.raises(LeaseLost):
        await store.presence.turn(mine, [Change((USERS, 2), True, 0)], None)
    with store._writing.connect() as connection:
        assert connection.execute(select(schema.present)).all() == []


# Real daemons.


def believed(backend: HttpBackend) -> set[int]:
    latest: dict[int, tuple[int, bool]] = {}
    for asked in backend.asked:
        if (event := asked.json["event"]).startswith("user."):
            data = asked.json["data"]
            heard = (data["version"], event == "user.online")
            latest[data["user_id"]] = max(latest.get(data["user_id"], heard), heard)
    return {id for id, (_, online) in latest.items() if online}


async def comes_to_believe(backend: HttpBackend, *ids: int, patience: float = 25.0) -> None:
    with trio.move_on_after(patience):
        while believed(backend) != set(ids):
            await trio.sleep(0.05)
    assert believed(backend) == set(ids)


async def test_a_daemon_that_was_killed_tells_at_its_next_start_who_has_gone(daemons: Daemons) -> None:
    with serving() as backend:
        daemon = daemons(webhooks__url=backend.url, webhooks__secret="w" * 32)
        async with login(daemon, 7), login(daemon, 8):
            await comes_to_believe(backend, 7, 8)
            await trio.to_thread.run_sync(daemon.kill)
        await trio.to_thread.run_sync(daemon.start)
        async with login(daemon, 8):
            await comes_to_believe(backend, 8)
            told = {one.json["event"] for one in backend.asked if one.json["data"].get("user_id") == 8}
            assert told == {"user.online"}  # perhaps twice: the kill may come before its delivery is noted
            await trio.to_thread.run_sync(daemon.stop)
        await trio.to_thread.run_sync(daemon.start)
        await comes_to_believe(backend)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_the_other_node_tells_of_one_that_ends(
    daemons: Daemons, postgres_url: str, redis_server: RedisServer, end: str
) -> None:
    with serving() as backend:
        settings = {"database__url": postgres_url, "redis__url": redis_server.url}
        here, there = (
            daemons(webhooks__url=backend.url, webhooks__secret="w" * 32, **settings) for _ in range(2)
        )
        async with login(here, 7):
            async with login(there, 7), login(there, 8):
                await comes_to_believe(backend, 7, 8)
                await trio.to_thread.run_sync(getattr(there, end))
            await comes_to_believe(backend, 7)


def test_leases_are_judged_by_looks() -> None:
    leases = Leases()

    def look(beat: int) -> list[str]:
        return [seen.name for seen in leases.see([Seen("l", "n", beat)])]

    assert leases.life("n") is Life.UNKNOWN
    for _ in range(3 * LOOKS):  # it lives, though slowly
        assert look(1) == look(1) == look(2) == look(2) == []
    for _ in range(LOOKS - 2):
        assert look(2) == []
    assert leases.life("n") is Life.HELD
    assert look(2) == ["l"]
    assert leases.life("n") is Life.OVER
    assert look(3) == []
    assert leases.life("n") is Life.HELD
    assert leases.see([Seen("l", "n", -1)]) == [Seen("l", "n", -1)]
