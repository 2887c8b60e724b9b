"""What a failover of PostgreSQL loses, and who is told: the standby lags, or is synchronous."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from chatd.config import Database
from chatd.store.database import migrate
from tests.client import Client, login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.replication import Replication
from tests.test_failover import SILENT, SOON, attempt, newest, post_until_stored

KEPT, LOST = 5, 5  # changes


@pytest.fixture
def lagging(tmp_path: Path) -> Iterator[Replication]:
    with Replication(tmp_path / "replication") as two:
        migrate(Database(url=two.url))
        yield two


@pytest.fixture
def synchronous(tmp_path: Path) -> Iterator[Replication]:
    with Replication(tmp_path / "replication") as two:
        migrate(Database(url=two.url))
        two.make_synchronous()
        yield two


async def in_thread(work: Any, *arguments: Any, **fields: Any) -> Any:
    return await trio.to_thread.run_sync(partial(work, *arguments, **fields))


async def lose_some(daemon: Daemon, two: Replication) -> None:
    """Some posts reach the standby, some do not, and it is promoted."""
    for number in range(KEPT):
        await in_thread(daemon.post, 1, 1, f"kept {number}")
    await in_thread(two.catch_up)
    two.standby.hold()
    for number in range(LOST):
        await in_thread(daemon.post, 1, 1, f"lost {number}")


def fail_over(two: Replication, daemon: Daemon, posts: int) -> None:
    """And so many posts more, on the new server."""
    two.fail_over()
    for number in range(posts):
        post_until_stored(daemon, f"new {number}", SOON)


def positions(client: Client) -> tuple[dict[str, Any], str]:
    """Where the client is in room 1: with its mark; and its epoch."""
    room = client.ready["rooms"]["1"]  # type: ignore[attr-defined]
    return {"after": room["seq"], "mark": room["mark"]}, client.ready["epoch"]  # type: ignore[attr-defined]


async def test_a_client_that_stays_is_told(lagging: Replication, daemons: Daemons) -> None:
    daemon = await in_thread(daemons, database__url=lagging.url)
    await in_thread(daemon.post, 1, 1, "first")
    async with login(daemon, 2, {"1": None}) as ada:
        await lose_some(daemon, lagging)
        await ada.messages(KEPT + LOST)
        await in_thread(fail_over, lagging, daemon, 1)
        told = await ada.expect("subscribed", patience=15)
        assert (told["recovered"], told["seq"]) == (False, 1 + KEPT + 1)
        assert [m["content"] for m in told["changes"]][-2:] == [f"kept {KEPT - 1}", "new 0"]
        await in_thread(daemon.post, 1, 1, "goes on")
        assert (await ada.expect("message"))["seq"] == 1 + KEPT + 2


@pytest.mark.parametrize("posts", [1, LOST, LOST + 2], ids=["before", "at", "past"])
async def test_a_client_that_comes_back_is_told(lagging: Replication, daemons: Daemons, posts: int) -> None:
    """Before the new history is where its cursor stands, when it is just there, and when it has passed it."""
    daemon = await in_thread(daemons, database__url=lagging.url)
    await lose_some(daemon, lagging)
    async with login(daemon, 2, {"1": None}) as ada:
        position, epoch = positions(ada)
        kept = {"after": KEPT - 1}
    await in_thread(fail_over, lagging, daemon, posts)
    head = KEPT + posts
    for rooms, said in (
        ({"1": position}, {}),  # a mark decides alone,
        ({"1": position}, {"epoch": epoch}),
        ({"1": position["after"]}, {"epoch": epoch}),  # and the epoch for clients that know no marks
    ):
        async with login(daemon, 2, rooms, **said) as ada:
            room = ada.ready["rooms"]["1"]  # type: ignore[attr-defined]
            assert (room["recovered"], room["seq"]) == (False, head), (rooms, said)
            now, new_epoch = positions(ada)
    assert new_epoch != epoch
    async with login(daemon, 2, {"1": now["after"]}, epoch=new_epoch) as ada:
        assert ada.ready["rooms"]["1"]["recovered"], "told once"  # type: ignore[attr-defined]
    async with login(daemon, 2, {"1": kept["after"]}, epoch=epoch) as ada:
        assert not ada.ready["rooms"]["1"]["recovered"], "a number alone does not prove it was kept"  # type: ignore[attr-defined]


async def test_a_failover_that_lost_nothing_costs_nobody_a_resync(
    synchronous: Replication, daemons: Daemons
) -> None:
    daemon = await in_thread(daemons, database__url=synchronous.url)
    for number in range(3):
        await in_thread(daemon.post, 1, 1, f"kept {number}")
    async with login(daemon, 2, {"1": None}) as ada, login(daemon, 3, {"1": None}) as grace:
        position, epoch = positions(ada)
        await in_thread(fail_over, synchronous, daemon, 2)
        heard = [m["content"] for m in await grace.messages(2)]
        assert heard == ["new 0", "new 1"]
    async with login(daemon, 2, {"1": position}, epoch=epoch) as ada:
        room = ada.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert (room["recovered"], [m["content"] for m in room["changes"]]) == (True, ["new 0", "new 1"])


async def test_a_synchronous_standby_has_what_was_acknowledged(
    synchronous: Replication, daemons: Daemons
) -> None:
    """Also where it is cut off while posts come: what it does not have is not acknowledged."""
    daemon = await in_thread(daemons, database__url=synchronous.url)
    acknowledged: list[str] = []

    async def post_some(name: str) -> None:
        for number in range(1000):
            if cut.is_set() or await in_thread(attempt, daemon, f"{name} {number}") != 200:
                return
            acknowledged.append(f"{name} {number}")
            if len(acknowledged) == 40:
                enough.set()

    enough, cut = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        for name in "abcd":
            nursery.start_soon(post_some, name)
        await enough.wait()
        await in_thread(synchronous.standby.hold)
        await trio.sleep(0.5)  # with posts on their way that nobody acknowledges
        await in_thread(synchronous.fail_over)
        cut.set()
    await in_thread(post_until_stored, daemon, "after", SOON)
    stored = {row[0] for row in synchronous.primary.execute("SELECT content FROM chat_messages")}
    assert set(acknowledged) <= stored
    assert await in_thread(newest, daemon) == "after"


@pytest.mark.parametrize("ends", ["the wait", "the server"])
async def test_what_the_standby_lacks_is_acknowledged_to_nobody(
    synchronous: Replication, daemons: Daemons, ends: str
) -> None:
    """A commit waits for the standby. Somebody ends that wait, or the server: then the row is there for all to
    see, and a retry finds it. PostgreSQL calls the first a success."""
    primary = synchronous.primary
    daemon = await in_thread(daemons, database__url=synchronous.url)
    await in_thread(daemon.post, 1, 1, "before")
    synchronous.standby.hold()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await in_thread(attempt, daemon, "unknown") == 503

        nursery.start_soon(ask)
        waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        await in_thread(primary.wait_for, f"SELECT count(*) = 1 {waiting}")
        if ends == "the wait":
            primary.execute(f"SELECT pg_cancel_backend(pid) {waiting}")
        else:
            await in_thread(primary.crash)
            await in_thread(primary.start)
    assert primary.scalar("SELECT count(*) FROM chat_messages WHERE content = 'unknown'") == 1
    assert await in_thread(attempt, daemon, "unknown") == 503, "the retry waits for the standby, too"
    synchronous.standby.let_go(primary)
    await in_thread(post_until_stored, daemon, "unknown", SILENT)
    await in_thread(synchronous.fail_over)
    assert synchronous.primary.scalar("SELECT count(*) FROM chat_messages WHERE content = 'unknown'") == 1
