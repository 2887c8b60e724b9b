"""Nothing missing, nothing twice: across reconnects, SIGKILL, bursts and holes."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from http.client import HTTPException
from typing import Any

import pytest
import trio

from chatd.config import Limits
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
        first = await ada.request("subscribe", conversation_id=conversation, after=50)
        assert await replayed(ada, conversation, 50, 350, first) == list(range(51, 351))


ANSWER = 32 * 1024  # bytes of one answer, at most


async def replayed(client: Client, conversation: int, after: int, end: int, first: Any = None) -> list[int]:
    """The seqs that answers bring, piece by piece, until the cursor has reached the end."""
    found: list[int] = []
    while after < end:
        piece = first or await client.expect("subscribed", conversation_id=conversation)
        first = None
        assert piece["recovered"], piece
        assert len(json.dumps(piece, separators=(",", ":"), ensure_ascii=False).encode()) <= ANSWER
        assert (piece["seq"], piece["mark"]) == (piece["changes"][-1]["seq"], piece["changes"][-1]["mark"])
        assert not piece["has_more"]
        found += [change["seq"] for change in piece["changes"]]
        after = piece["seq"]
    return found


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
                    event = await client.next()
                    if event["event"] == "subscribed":  # what did not fit into `ready`
                        assert event["recovered"]
                        seen += [change["seq"] for change in event["changes"]]
                        cursor = event["seq"]
                    elif event["event"] == "message":
                        seen.append(event["seq"])
                        cursor = seen[-1]
        assert seen == list(range(1, total + 1))

    async with trio.open_nursery() as nursery:
        for user in range(2, 8):
            nursery.start_soon(read, user)
        nursery.start_soon(write, nursery)


BIG = "x" * 8000  # characters: the most of a message


def batch(daemon: Daemon, conversation: int, contents: list[str], sender: int = 9) -> None:
    messages = [{"conversation_id": conversation, "sender_id": sender, "content": c} for c in contents]
    answer = daemon.request("POST", "/api/ws/messages/batch", {"messages": messages})
    assert answer.status == 200
    assert all(result.get("status") == "ok" for result in answer.json["results"]), answer.json


async def page_back(client: Client, conversation: int, before: int) -> list[str]:
    """All contents before a message, read page by page."""
    contents: list[str] = []
    has_more = True
    while has_more:
        page = await client.request("history", conversation_id=conversation, before=before, limit=100)
        contents = [m["content"] for m in page["messages"]] + contents
        has_more = page["has_more"]
        before = page["messages"][0]["id"]
    return contents


async def test_three_hundred_long_messages_are_paged_back_on_a_connection_that_lives(
    daemon: Daemon, conversation: int
) -> None:
    """2.4 MB were missed, more than any outbox holds: bounded in bytes, never cut off for it."""
    contents = [f"{number:04}{BIG[4:]}" for number in range(300)]
    await trio.to_thread.run_sync(batch, daemon, conversation, contents)
    async with login(daemon, 1, {str(conversation): 0}) as ada:
        room = ada.ready["rooms"][str(conversation)]  # type: ignore[attr-defined]
        assert (room["recovered"], room["seq"], room["changes"]) == (True, 0, [])
        room = await ada.expect("subscribed")
        assert (room["recovered"], room["seq"], room["has_more"]) == (False, 300, True)
        newest = [m["content"] for m in room["changes"]]
        assert 2 < len(newest) < 5
        assert await page_back(ada, conversation, room["changes"][0]["id"]) + newest == contents
        await ada.silence()


async def test_pipelined_pages_of_history_do_not_cut_off_who_reads(daemon: Daemon, conversation: int) -> None:
    """Thirty-two requests may wait; their answers, 256 KiB each, come as fast as they are read."""
    await trio.to_thread.run_sync(batch, daemon, conversation, [BIG] * 100)
    async with login(daemon, 1) as ada:
        for ref in range(32):
            await ada.send("history", ref=ref + 100, conversation_id=conversation, limit=100)
        await trio.sleep(0.5)  # it dawdles: more is on its way than an outbox holds
        answered = set()
        for _ in range(32):
            page = await ada.expect("history")
            assert len(page["messages"]) > 20
            answered.add(page["ref"])
        assert answered == set(range(100, 132))
        await ada.silence()


async def test_messages_changed_while_away_come_as_they_are_now(daemon: Daemon, conversation: int) -> None:
    first = await trio.to_thread.run_sync(daemon.post, conversation, 9, "heard")
    async with login(daemon, 1, {str(conversation): None}) as ada:
        cursor = ada.ready["rooms"][str(conversation)]["seq"]  # type: ignore[attr-defined]
    second = await trio.to_thread.run_sync(daemon.post, conversation, 9, "missed")
    third = await trio.to_thread.run_sync(daemon.post, conversation, 9, "missed too")
    for method, id, body in (
        ("PATCH", first["id"], {"content": "heard, edited"}),
        ("PATCH", first["id"], {"content": "heard, edited twice"}),
        ("PATCH", second["id"], {"content": "missed, edited"}),
        ("DELETE", third["id"], None),
    ):
        answer = await trio.to_thread.run_sync(daemon.request, method, f"/api/ws/messages/{id}", body)
        assert answer.status == 200
    async with login(daemon, 1, {str(conversation): cursor}) as ada:
        room = ada.ready["rooms"][str(conversation)]  # type: ignore[attr-defined]
        assert room["recovered"]
        assert [(c["seq"], c["event"], c["id"], c["content"]) for c in room["changes"]] == [
            (2, "message", second["id"], "missed, edited"),
            (3, "message", third["id"], None),
            (4, "message.updated", first["id"], "heard, edited twice"),
            (5, "message.updated", first["id"], "heard, edited twice"),
            (6, "message.updated", second["id"], "missed, edited"),
            (7, "message.deleted", third["id"], None),
        ]
        await trio.to_thread.run_sync(daemon.post, conversation, 9, "live")
        assert (await ada.expect("message"))["seq"] == 8


async def test_who_was_removed_while_away_gets_nothing(daemons: Daemons) -> None:
    daemon = daemons(rooms__access="members")
    member = "/api/ws/conversations/1/members/1"
    await post(daemon, 1, "heard")
    await trio.to_thread.run_sync(daemon.request, "PUT", member)
    async with login(daemon, 1, {"1": 0}) as ada:
        assert [c["content"] for c in ada.ready["rooms"]["1"]["changes"]] == ["heard"]  # type: ignore[attr-defined]
    await trio.to_thread.run_sync(daemon.request, "DELETE", member)
    await post(daemon, 1, "not for Ada")
    token = await trio.to_thread.run_sync(lambda: daemon.token_for(1, conversations=[1]))
    async with login(daemon, 1, {"1": 1}, token=token) as ada:
        assert ada.ready["rooms"] == {}  # type: ignore[attr-defined]
        assert (await ada.expect("unsubscribed", conversation_id=1))["code"] == "not_found"
        for event, fields in (("subscribe", {"after": 1}), ("history", {})):
            refused = await ada.request(event, conversation_id=1, **fields)
            assert (refused["event"], refused["code"]) == ("error", "not_found")
        await post(daemon, 1, "nor this")
        await ada.silence()
        await trio.to_thread.run_sync(daemon.request, "PUT", member)
        back = await ada.request("subscribe", conversation_id=1, after=1)
        assert [c["content"] for c in back["changes"]] == ["not for Ada", "nor this"]


async def test_many_rooms_come_back_in_one_auth(daemon: Daemon, conversation: int) -> None:
    """Two hundred rooms with 3 MB of missed messages: what does not fit into `ready` follows by itself."""
    rooms = [conversation * 1000 + number for number in range(200)]
    async with trio.open_nursery() as nursery:
        for start in range(0, 200, 50):
            messages = [
                {"conversation_id": room, "sender_id": 9, "content": f"{number} {BIG[:7900]}"}
                for room in rooms[start : start + 50]
                for number in range(2)
            ]
            body = {"messages": messages}
            nursery.start_soon(trio.to_thread.run_sync, daemon.request, "POST", "/api/ws/messages/batch", body)
    async with login(daemon, 1, {str(room): 0 for room in rooms}) as ada:
        answered = ada.ready["rooms"]  # type: ignore[attr-defined]
        assert set(answered) == {str(room) for room in rooms}
        assert all(room["recovered"] for room in answered.values())
        assert len(json.dumps(answered)) < 2 * ANSWER + 200 * 400  # of messages, and of heads
        for number, room in answered.items():
            if not room["changes"]:
                assert room["seq"] == 0
                assert await replayed(ada, int(number), 0, 2) == [1, 2]
        await post(daemon, rooms[-1], "live")
        assert (await ada.expect("message"))["conversation_id"] == rooms[-1]
        await ada.silence()


async def test_an_inbox_of_five_hundred_rooms_is_whole_and_leaves_room_for_others(
    daemon: Daemon, conversation: int
) -> None:
    user = 200_000 + conversation
    rooms = [conversation * 1000 + number for number in range(500)]
    messages = [{"conversation_id": room, "sender_id": user, "content": "mine"} for room in rooms]
    body = {"messages": messages}
    await trio.to_thread.run_sync(daemon.request, "POST", "/api/ws/messages/batch", body)
    async with login(daemon, user, "*") as inbox:
        answered = inbox.ready["rooms"]  # type: ignore[attr-defined]
        assert set(answered) == {str(room) for room in rooms}
        assert all(
            (room["seq"], room["recovered"], room["changes"]) == (1, True, []) for room in answered.values()
        )
        for room in (rooms[0], rooms[-1]):
            await post(daemon, room, "news")
            assert (await inbox.expect("message"))["conversation_id"] == room
        other = await inbox.request("subscribe", conversation_id=conversation)
        assert other["event"] == "subscribed"
        again = await inbox.request("subscribe", conversation_id=rooms[0], after=0)
        assert [c["content"] for c in again["changes"]] == ["mine", "news"]


async def test_after_a_restore_a_new_epoch_makes_clients_start_over(daemons: Daemons) -> None:
    """A copy from before is put back, and grows past the client's cursor with other messages."""
    daemon = daemons()
    database = daemon.directory / "chatd.db"
    await post(daemon, 1, "one", "two")
    await trio.to_thread.run_sync(daemon.stop)
    copy = database.read_bytes()
    await trio.to_thread.run_sync(daemon.start)
    async with login(daemon, 1, {"1": 0}) as ada:
        epoch = ada.ready["epoch"]  # type: ignore[attr-defined]
        await post(daemon, 1, "lost three", "lost four")
        cursor = (await ada.messages(2))[-1]["seq"]
    await trio.to_thread.run_sync(daemon.stop)
    database.write_bytes(copy)
    with closing(sqlite3.connect(database)) as restored, restored:
        restored.execute("UPDATE chat_meta SET value = 'after the restore' WHERE key = 'epoch'")
    await trio.to_thread.run_sync(daemon.start)
    await post(daemon, 1, "new three", "new four", "new five")
    async with login(daemon, 1, {"1": cursor}, epoch=epoch) as ada:
        room = ada.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert ada.ready["epoch"] == "after the restore"  # type: ignore[attr-defined]
        assert (room["recovered"], room["seq"]) == (False, 5)
        assert [m["content"] for m in room["changes"]] == ["one", "two", "new three", "new four", "new five"]


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
    from chatd.core import limits
    from chatd.hub.connection.send_queue import LIMIT_BYTES

    assert limits.READY_BYTES <= LIMIT_BYTES // 2
    assert limits.REPLAY_BYTES + Limits().content_chars * 12 < LIMIT_BYTES // 2
