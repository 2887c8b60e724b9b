"""Nothing missing, nothing twice: across reconnects, SIGKILL, bursts and holes."""

from __future__ import annotations

import random
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from chatd.config import Database, Limits
from chatd.hub.fanout import Fanout
from chatd.hub.rooms import Membership, Rooms, Subscription, text_frame
from chatd.model import Change, Kind, MemberChange, State
from chatd.store import reads
from chatd.store.commands import Create
from chatd.store.database import Store, open_store
from tests.client import Client, login
from tests.conftest import Daemons
from tests.daemon import Daemon


async def post(daemon: Daemon, conversation: int, *contents: str) -> None:
    for content in contents:
        await trio.to_thread.run_sync(daemon.post, conversation, 9, content)


async def test_after_sigkill_a_resume_brings_what_was_missed_and_no_more(daemons: Daemons) -> None:
    daemon = daemons()
    async with login(daemon, 1, {"1": None}) as ada:
        await post(daemon, 1, "heard")
        cursor = (await ada.expect("message"))["seq"]
        epoch = ada.ready["epoch"]  # type: ignore[attr-defined]
    await post(daemon, 1, "missed 1", "missed 2")
    await trio.to_thread.run_sync(daemon.kill)
    await trio.to_thread.run_sync(daemon.start)
    await post(daemon, 1, "missed 3")
    async with login(daemon, 1, {"1": cursor}, epoch=epoch) as ada:
        room = ada.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert (room["recovered"], room["seq"]) == (True, 4)
        assert [(c["seq"], c["content"]) for c in room["changes"]] == [
            (2, "missed 1"), (3, "missed 2"), (4, "missed 3"),
        ]  # fmt: skip
        history = await ada.request("history", conversation_id=1)
        assert [m["content"] for m in history["messages"]] == ["heard", "missed 1", "missed 2", "missed 3"]
        await ada.silence()


async def test_acknowledged_posts_survive_sigkill_in_mid_burst(daemons: Daemons) -> None:
    """G1 and G3 over rounds of murder, with retries of what was not answered."""
    daemon = daemons()
    acknowledged: dict[str, int] = {}

    def burst(worker: int, round_: int) -> None:
        for number in range(200):
            key = f"{round_}-{worker}-{number}"
            try:
                acknowledged[key] = daemon.post(1, worker, key, client_id=key)["seq"]
            except (OSError, HTTPException):
                return

    for round_ in range(3):
        async with trio.open_nursery() as nursery:
            for worker in range(1, 5):
                nursery.start_soon(trio.to_thread.run_sync, burst, worker, round_)
            await trio.sleep(0.4)  # some of the burst is answered, the rest is not
            await trio.to_thread.run_sync(daemon.kill)
        await trio.to_thread.run_sync(daemon.start)
    stored: dict[str, int] = {}
    before = None
    while True:
        query = f"?limit=100&before={before}" if before else "?limit=100"
        answer = await trio.to_thread.run_sync(daemon.get, f"/api/ws/conversations/1/messages{query}")
        page = answer.json
        stored |= {m["client_id"]: m["seq"] for m in page["messages"]}
        if not page["has_more"]:
            break
        before = page["messages"][0]["id"]
    assert len(acknowledged) > 20
    assert acknowledged.items() <= stored.items()
    assert sorted(stored.values()) == list(range(1, len(stored) + 1))


async def test_too_much_missed_is_said_and_the_newest_come(daemon: Daemon, conversation: int) -> None:
    batch = [{"conversation_id": conversation, "sender_id": 1, "content": f"m{n}"} for n in range(350)]
    await trio.to_thread.run_sync(daemon.request, "POST", "/api/ws/messages/batch", {"messages": batch})
    async with login(daemon, 1) as ada:
        lost = await ada.request("subscribe", conversation_id=conversation, after=10)
        assert (lost["recovered"], lost["has_more"], lost["seq"]) == (False, True, 350)
        assert [m["content"] for m in lost["changes"]] == [f"m{n}" for n in range(300, 350)]
        older = await ada.request("history", conversation_id=conversation, before=lost["changes"][0]["id"])
        assert older["messages"][-1]["content"] == "m299"
        whole = await ada.request("subscribe", conversation_id=conversation, after=50)
        assert (whole["recovered"], len(whole["changes"])) == (True, 300)


@pytest.mark.parametrize("wrong", [{"epoch": "another"}, {"after": 99}])
async def test_a_cursor_of_another_history_is_not_believed(
    daemon: Daemon, conversation: int, wrong: dict[str, Any]
) -> None:
    await post(daemon, conversation, "one", "two")
    async with login(daemon, 1) as ada:
        fields = {"after": 1} | wrong
        answer = await ada.request("subscribe", conversation_id=conversation, **fields)
        assert (answer["recovered"], [m["content"] for m in answer["changes"]]) == (False, ["one", "two"])


async def test_readers_that_come_and_go_in_a_storm_of_writes_see_every_seq_once(
    daemon: Daemon, conversation: int
) -> None:
    """G4: each reader reconnects at random and resumes; what it was given adds up to 1, 2, 3 …"""
    total = 250
    dice = random.Random(7)

    async def write(nursery: trio.Nursery) -> None:
        async with login(daemon, 1) as ada:
            for start in range(0, total, 10):
                for number in range(start, start + 10):
                    await ada.send("send", conversation_id=conversation, content=str(number))
                await trio.sleep(0.01)
            await ada.request("ping")

    async def read(user: int) -> None:
        cursor, seen = 0, []
        while cursor < total:
            async with login(daemon, user, {str(conversation): cursor}) as client:
                room = client.ready["rooms"][str(conversation)]  # type: ignore[attr-defined]
                assert room["recovered"]
                assert all(change["seq"] > cursor for change in room["changes"])
                seen += [change["seq"] for change in room["changes"]]
                cursor = room["seq"]
                for _ in range(dice.randrange(1, 80)):
                    if cursor == total:
                        break
                    seen.append((await client.expect("message"))["seq"])
                    cursor = seen[-1]
        assert seen == list(range(1, total + 1))

    async with trio.open_nursery() as nursery:
        for user in range(2, 8):
            nursery.start_soon(read, user)
        nursery.start_soon(write, nursery)


async def test_the_inbox_holds_all_of_a_users_conversations(daemon: Daemon, conversation: int) -> None:
    user = 100_000 + conversation
    for offset in range(3):
        await trio.to_thread.run_sync(daemon.post, conversation * 10 + offset, user, "mine")
    async with login(daemon, user, "*") as inbox:
        rooms = inbox.ready["rooms"]  # type: ignore[attr-defined]
        assert set(rooms) == {str(conversation * 10 + offset) for offset in range(3)}
        assert all((room["seq"], room["changes"]) == (1, []) for room in rooms.values())
        await post(daemon, conversation * 10 + 2, "news")
        assert (await inbox.expect("message"))["content"] == "news"


# The fanout itself, against a real store: what the bus loses or doubles is repaired in place.


class Ear:
    """A listener whose payloads are told apart by seq."""

    user_id, flat = 1, False

    def __init__(self) -> None:
        self.heard = bytearray()
        self.resynced: list[Subscription] = []

    def push(self, frames: bytes) -> None:
        self.heard += frames

    def resync(self, subscription: Subscription) -> None:
        subscription.hold()
        self.resynced.append(subscription)

    def dropped(self, subscription: Subscription) -> None:
        raise AssertionError("nobody was removed")


class Repairs:
    """A fanout with one live subscription, and the changes that were committed but not told."""

    def __init__(self, store: Store, fanout: Fanout, ear: Ear, changes: list[Change]) -> None:
        self.store, self.fanout, self.ear, self.changes = store, fanout, ear, changes

    async def heard(self, *seqs: int, patience: float = 3.0) -> None:
        """Exactly these have been pushed, in this order."""
        expected = b"".join(text_frame(self.changes[seq - 1].payload) for seq in seqs)
        with trio.move_on_after(patience):
            while len(self.ear.heard) < len(expected):
                await trio.sleep(0.005)
        assert self.ear.heard == expected


@pytest.fixture
async def repairs(tmp_path: Path, nursery: trio.Nursery) -> Any:
    store = open_store(Database(url=f"sqlite:///{tmp_path}/x.db"))
    groups: list[Any] = []
    writer = store.writer(node=None, on_commit=groups.append)
    nursery.start_soon(writer.run)
    rooms, ear = Rooms(), Ear()
    fanout = Fanout(rooms, store.read)
    await nursery.start(fanout.run)
    with Membership(rooms) as mine:
        subscription = mine.join(1, ear, entitled=True)
        subscription.settle(0)
        fanout.opened(subscription.room, 0, 0)
        await writer.submit(
            [Create(conversation_id=1, user_id=1, content=f"m{n}") for n in range(400)]
        ).outcomes()
        yield Repairs(store, fanout, ear, [change for group in groups for change in group.changes])
    store.close()


async def test_a_hole_is_read_from_the_database(repairs: Repairs) -> None:
    """The hole, and what was committed after it: within the second that G5 allows."""
    repairs.fanout.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.fanout.changes([repairs.changes[203]])
    await repairs.heard(*range(1, 401), patience=1)


async def test_a_hole_that_fills_by_itself_is_not_read(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(*_: Any) -> Any:
        raise AssertionError("the database was asked")

    monkeypatch.setattr("chatd.hub.fanout.HOLE_WAIT", 0.2)
    monkeypatch.setattr(reads, "changes_after", no_reading)
    for seq in (2, 1, 4, 3, 3, 1):
        repairs.fanout.changes([repairs.changes[seq - 1]])
        await wait_all_tasks_blocked()  # the fanout has seen the hole before it is filled
    await repairs.heard(1, 2, 3, 4)
    await trio.sleep(0.3)  # longer than a hole is waited for


async def test_more_than_can_be_pushed_makes_everybody_start_over(repairs: Repairs) -> None:
    repairs.fanout.lost()
    with trio.fail_after(3):
        while not repairs.ear.resynced:
            await trio.sleep(0.005)
    assert repairs.ear.heard == b"", "400 missed changes are not pushed"


async def test_a_forged_change_blocks_nobody(repairs: Repairs) -> None:
    """A seq that the database does not know, with a hole before it, is given up."""
    repairs.fanout.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.fanout.changes([Change(1, 10_000, Kind.CREATED, b"forged")])
    await repairs.heard(*range(1, 401))
    with trio.fail_after(2):
        while repairs.fanout._rooms.get(1).ahead:  # type: ignore[union-attr]
            await trio.sleep(0.01)


async def test_without_redis_in_sight_a_hole_is_read_at_once(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.hub.fanout.HOLE_WAIT", 60)
    repairs.fanout.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.fanout._up = False  # as `links(False)` does, without the sweep that goes with it
    repairs.fanout.changes([repairs.changes[250]])
    await repairs.heard(*range(1, 401))


async def test_a_late_removal_does_not_undo_a_return(repairs: Repairs) -> None:
    """The signal outlived an outage; meanwhile the user was added again, and the room knows it."""
    repairs.fanout._rooms.get(1).members_version = 6  # type: ignore[union-attr]
    repairs.fanout.member(
        MemberChange(1, Ear.user_id, State.REMOVED, None, version=5)
    )  # Ear asserts: not dropped
    repairs.fanout.changes(repairs.changes[:1])
    with trio.fail_after(2):
        while not repairs.ear.heard:
            await trio.sleep(0.005)


async def test_a_burst_over_a_room_that_people_leave_ends_nothing(repairs: Repairs) -> None:
    leavers: list[Membership] = []

    class Leaver(Ear):
        def resync(self, subscription: Subscription) -> None:
            assert subscription.joined, "its nursery is gone"
            for one in leavers:
                one.leave(1)

    for _ in range(400):
        mine = Membership(repairs.fanout._rooms)
        repairs.fanout.opened(mine.join(1, Leaver(), entitled=True).room, 0, 0)
        next(iter(mine)).settle(0)
        leavers.append(mine)
    big = [Change(1, seq, Kind.CREATED, b"x" * 100_000) for seq in range(1, 8)]
    repairs.fanout.changes(big)
    with trio.fail_after(2):
        while not repairs.ear.resynced:
            await trio.sleep(0.005)
    await wait_all_tasks_blocked()


async def test_an_overrun_queue_is_made_up_for(repairs: Repairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatd.hub.fanout.QUEUE_BYTES", 200 * 180)
    for start in range(0, 400, 100):
        repairs.fanout.changes(repairs.changes[start : start + 100])
    await repairs.heard(*range(1, 401))


async def test_a_subscriber_in_a_busy_room_starts_over_without_a_gap(daemons: Daemons) -> None:
    """A client that asks again in the middle of the traffic gets an answer that fits what it hears next."""
    daemon = daemons(limits__sends_per_second=0)

    async def talk(client: Client) -> None:
        for number in range(150):
            await client.send("send", conversation_id=1, content=str(number))
            await trio.sleep(0.002)

    async with login(daemon, 1) as ada, login(daemon, 2, {"1": 0}) as grace, trio.open_nursery() as nursery:
        nursery.start_soon(talk, ada)
        cursor = 0
        while cursor < 150:
            event = await grace.next()
            if event["event"] == "message":
                assert event["seq"] == cursor + 1
                cursor += 1
                if cursor % 10 == 0:
                    await grace.send("subscribe", ref=cursor, conversation_id=1, after=cursor)
            elif event["event"] == "subscribed":
                assert [c["seq"] for c in event["changes"]] == list(range(event["ref"] + 1, event["seq"] + 1))
                assert event["seq"] >= cursor
                cursor = event["seq"]


def test_the_limits_leave_an_honest_resume_below_the_outbox() -> None:
    from chatd import limits
    from chatd.hub.outbox import LIMIT_BYTES

    assert limits.READY_BYTES <= LIMIT_BYTES // 2
    assert limits.REPLAY_BYTES + Limits().content_chars * 12 < LIMIT_BYTES // 2
