"""Retention: what goes, what stays, and what clients see of it, on SQLite and on PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy import text

from chatd.config import Config
from chatd.config import Retention as Kept
from chatd.config.settings import Settings
from chatd.daemon.retention import RetentionClock
from chatd.store.read import lookups
from chatd.store.upkeep import erasure, retention, scans
from chatd.store.upkeep.retention import Pruner, Rules
from chatd.store.write.commands import Create, Delete, Edit, Notify, React
from tests.client import login
from tests.conftest import Daemons
from tests.test_store import Bench, bench, post, snapshot_of

OLD = "2020-01-01T00:00:00.000000Z"


def age(b: Bench, below: int) -> None:
    """Messages below this id are from 2020."""
    column = "created_at = '2020-01-01T00:00:00.000000Z'"
    b.execute(f"UPDATE chat_messages SET {column} WHERE id < {below}")


def prune(b: Bench, **rules: Any) -> tuple[int, list[int]]:
    """(found, removed by each step)"""
    pruner = Pruner(b.store._writing, Rules(**rules))
    found, removed = pruner.find(), []
    while (count := pruner.step()) is not None:
        removed.append(count)
    return found, removed


async def contents(b: Bench, conversation_id: int = 1) -> list[str | None]:
    page = await b.store.read(lookups.history, conversation_id, None, None, 100)
    return [message.content for message in page.messages]


async def log(b: Bench, after: int, conversation_id: int = 1) -> list[int]:
    changes, _ = await b.store.read(lookups.changes_after, conversation_id, after)
    return [change.seq for change in changes]


async def test_old_messages_go_and_the_log_with_them(database_url: str) -> None:
    async with bench(database_url) as b:
        created = await b.do(*[post(f"{n}") for n in range(6)], post("elsewhere", conversation_id=2))
        await b.do(React(message_id=created[0].id, conversation_id=1, user_id=2, emoji="👍", on=True))
        age(b, created[3].id)
        assert prune(b, days=365) == (3, [0, 3])
        assert await contents(b) == ["3", "4", "5"]
        assert await contents(b, 2) == ["elsewhere"]
        assert b.scalar("SELECT count(*) FROM chat_reactions") == 0
        # The log begins after the newest message that went.
        assert (await snapshot_of(b, 1, 3)).recovered
        assert not (await snapshot_of(b, 1, 2)).recovered
        assert [m.seq for m in (await b.store.read(lookups.history, 1, None, None, 9)).messages] == [4, 5, 6]
        # It goes on as ever, with ids and seqs that nobody had.
        (more,) = await b.do(post("more"))
        assert (more.seq, more.id > created[-1].id) == (8, True)
        assert await log(b, 7) == [8]
        assert prune(b, days=365) == (0, [])


async def test_what_has_happened_to_an_old_message_cuts_nobody_off(database_url: str) -> None:
    """Who was away for a moment hears of a message that went what is true now: that it is gone."""
    async with bench(database_url) as b:
        old = [one.id for one in await b.do(*[post(f"old {n}") for n in range(4)])]
        await b.do(post("young"))
        await b.do(
            React(message_id=old[0], conversation_id=1, user_id=2, emoji="👍", on=True),
            Edit(message_id=old[1], content="edited"),
            Delete(message_id=old[2]),
            React(message_id=old[0], conversation_id=1, user_id=3, emoji="👍", on=True),
        )
        age(b, old[3] + 1)
        prune(b, days=365)
        for cursor in range(4, 9):
            back = await snapshot_of(b, 9, cursor)
            assert back.recovered
            changes = [msgspec.json.decode(change.payload) for change in back.changes]
            assert [change["seq"] for change in changes] == list(range(cursor + 1, 10))
            for change in changes[-4:]:
                assert (change["event"], change["content"], change["meta"]) == ("message.deleted", None, None)
                assert (change["user_id"], change["type"]) == (1, "text")
                assert change["created_at"] == OLD
                assert change["deleted_at"] > OLD
        by_id = [msgspec.json.decode(change.payload)["id"] for change in (await snapshot_of(b, 9, 5)).changes]
        assert by_id == [old[0], old[1], old[2], old[0]]
        assert not (await snapshot_of(b, 9, 3)).recovered
        mark = b.scalar("SELECT mark FROM chat_changes WHERE seq = 5")
        missing = await b.store.read(lookups.missing, 1, 5, mark)
        assert [change.seq for change in missing.changes] == [6, 7, 8, 9], "for nodes, too"


async def test_what_is_kept_of_removed_messages_goes_when_the_log_has_passed_it(database_url: str) -> None:
    async with bench(database_url) as b:
        ids = [one.id for one in await b.do(*[post(f"{n}") for n in range(6)])]
        await b.do(React(message_id=ids[0], conversation_id=1, user_id=2, emoji="👍", on=True))
        prune(b, messages=3)
        assert b.scalar("SELECT count(*) FROM chat_removed_messages") == 1
        await b.do(*[post(f"more {n}") for n in range(3)])
        prune(b, messages=3)
        assert b.scalar("SELECT low_seq FROM chat_conversations") == 6
        assert b.scalar("SELECT count(*) FROM chat_removed_messages") == 1
        await b.do(post("last"))
        prune(b, messages=3)
        assert b.scalar("SELECT low_seq FROM chat_conversations") == 8
        assert b.scalar("SELECT count(*) FROM chat_removed_messages") == 0


async def test_a_retry_is_one_for_ever(database_url: str) -> None:
    """G2 outlives the message: what retention has removed is not posted anew by a retry."""
    async with bench(database_url) as b:
        (first, _, other) = await b.do(
            post("first", client_id="k"), post("no name"), post("there", client_id="k", conversation_id=2)
        )
        prune(b, messages=0, days=1e-9)
        assert await contents(b) == await contents(b, 2) == []
        again, changed, somebody, elsewhere = await b.do(
            post("first", client_id="k"),
            post("changed", client_id="k"),
            post("first", client_id="k", user_id=2),
            post("there", client_id="k", conversation_id=2),
        )
        assert again == msgspec.structs.replace(first, duplicate=True)
        assert changed == "conflict"
        assert (somebody.duplicate, somebody.seq) == (False, 3)
        assert elsewhere == msgspec.structs.replace(other, duplicate=True)
        prune(b, messages=0, days=1e-9)
        assert (await b.do(post("first", client_id="k", user_id=2)))[0].id == somebody.id
        assert b.scalar("SELECT count(*) FROM chat_client_ids") == 3


async def test_a_version_that_forgot_a_client_id_stops_no_retention(database_url: str) -> None:
    """It removed a message and stored its retry anew, while another version ran beside it."""
    async with bench(database_url) as b:
        (first,) = await b.do(post("x", client_id="k"))
        prune(b, days=1e-9)
        b.execute("UPDATE chat_conversations SET low_seq = 0")
        (second,) = await b.do(post("x", client_id="k"))
        assert second.id > first.id
        assert sum(prune(b, days=1e-9)[1]) == 1
        assert (await b.do(post("x", client_id="k")))[0].id == first.id


async def test_a_client_id_that_outlives_its_message_is_erased_with_its_user(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(post("a", client_id="secret"), post("b", client_id="secret", user_id=2))
        prune(b, days=1e-9)
        exported = list(erasure.export(b.store._writing, 1))
        assert [row["client_id"] for row in exported if row["table"] == "chat_client_ids"] == ["secret"]
        assert not any("request_hash" in row for row in exported)
        erasure.Erasure(b.store._writing, 1, None, lambda count: None).run()
        assert b.scalar("SELECT user_id FROM chat_client_ids") == 2


async def test_what_a_client_id_costs_for_ever(tmp_path: Path) -> None:
    """docs/backup.md says how many bytes: the size of a UUID is usual."""
    async with bench(f"sqlite:///{tmp_path}/chatd.db") as b:
        for start in range(0, 20_000, 500):
            await b.do(*[post("x", client_id=str(uuid.uuid4()), user_id=start + n) for n in range(500)])
        prune(b, days=1e-9)
        b.execute("CREATE VIRTUAL TABLE IF NOT EXISTS temp.space USING dbstat(main)")
        size = b.scalar("SELECT sum(pgsize) FROM temp.space WHERE name = 'chat_client_ids'")
        assert b.scalar("SELECT count(*) FROM chat_client_ids") == 20_000
        assert size / 20_000 < 200


async def test_the_newest_stay_where_there_are_too_many(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post(f"{n}") for n in range(5)], *[post(f"{n}", conversation_id=2) for n in range(3)])
        assert prune(b, messages=3)[0] == 2
        assert await contents(b) == ["2", "3", "4"]
        assert await contents(b, 2) == ["0", "1", "2"]
        snapshot = await snapshot_of(b, 1, 2)
        assert (snapshot.recovered, len(snapshot.changes)) == (True, 3)
        assert not (await snapshot_of(b, 1, 1)).recovered


async def test_it_goes_in_small_steps(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 10)
    async with bench(database_url) as b:
        await b.do(*[post(f"{n}") for n in range(35)])
        found, removed = prune(b, messages=4)
        assert (found, max(removed), sum(removed)) == (31, 10, 31)
        assert await contents(b) == ["31", "32", "33", "34"]


async def test_no_change_is_ever_without_its_message(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody edits, deletes or reacts to an old message between two steps."""
    monkeypatch.setattr(retention, "BATCH", 2)
    async with bench(database_url) as b:
        ids = [one.id for one in await b.do(*[post(f"{n}") for n in range(8)])]
        pruner = Pruner(b.store._writing, Rules(messages=2))
        pruner.find()
        meddling: Sequence[Any] = [
            Edit(message_id=ids[1], content="late"),
            React(message_id=ids[3], conversation_id=1, user_id=2, emoji="👍", on=True),
            Delete(message_id=ids[5]),
            Create(conversation_id=1, user_id=1, content="new"),
        ]
        for command in [*meddling, *[None] * 20]:
            if pruner.step() is None:
                break
            if command is not None:
                await b.do(command)
            head = b.scalar("SELECT last_seq FROM chat_conversations")
            low = b.scalar("SELECT low_seq FROM chat_conversations")
            assert await log(b, low) == list(range(low + 1, head + 1))
        assert await contents(b) == ["6", "7", "new"]


async def test_unread_counts_only_what_is_there(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post(f"{n}") for n in range(5)])
        assert (await snapshot_of(b, 9, None)).unread == 5
        prune(b, messages=2)
        assert (await snapshot_of(b, 9, None)).unread == 2


async def test_what_nobody_comes_for_goes_from_the_queues(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis or webhooks were turned off, say."""
    monkeypatch.setattr(retention, "BATCH", 2)
    async with bench(database_url, node="one") as b:
        for _ in range(3):
            await b.do(post())
        await b.do(*[Notify(event="e", body=b"{}") for _ in range(4)])
        b.execute("UPDATE chat_webhooks SET dead = (id > 1), due_at = '2020-01-01T00:00:00.000000Z'")
        b.execute("UPDATE chat_outbox SET created_at = '2020-01-01T00:00:00.000000Z' WHERE id < 3")
        removed = [retention.remove_leftovers(b.store._writing) for _ in range(3)]
        assert removed == [4, 1, 0]
        assert b.scalar("SELECT count(*) FROM chat_outbox") == 1
        assert b.scalar("SELECT count(*) FROM chat_webhooks") == 1


async def test_an_answer_outlives_what_it_answers(database_url: str) -> None:
    async with bench(database_url) as b:
        old, answer = await b.do(post("question"), post("filler"))
        (answer,) = await b.do(post("answer", reply_to=old.id))
        prune(b, messages=1)
        (left,) = (await b.store.read(lookups.history, 1, None, None, 9)).messages
        assert (left.id, left.content, left.reply_to) == (answer.id, "answer", old.id)
        assert await b.do(Edit(message_id=answer.id, content="edited")) != ["not_found"]
        assert await b.do(post("too late", reply_to=old.id)) == ["bad_request"]


async def test_nothing_young_goes_because_a_clock_was_wrong(database_url: str) -> None:
    """Old messages are looked for by halves, as if time only went forward."""
    async with bench(database_url) as b:
        ids = [one.id for one in await b.do(*[post(f"{n}") for n in range(9)])]
        b.execute("UPDATE chat_messages SET created_at = '2020-01-01T00:00:00.000000Z'"
                  f" WHERE id IN ({ids[0]}, {ids[4]}, {ids[5]})")  # fmt: skip
        found, removed = prune(b, days=365)
        assert (found, sum(removed)) == (3, 3)
        assert await contents(b) == ["1", "2", "3", "6", "7", "8"]


async def test_looking_keeps_nobody_from_writing(database_url: str) -> None:
    """It may take long in a large database."""
    async with bench(database_url) as b:
        await b.do(post())
        with scans.looking(b.store._writing) as connection:
            assert connection.scalar(text("SELECT count(*) FROM chat_messages")) == 1
            (more,) = await b.do(post())
            assert more.seq == 2
            assert connection.scalar(text("SELECT count(*) FROM chat_messages")) == 1, "as of one moment"


async def test_the_command_waits_for_a_node_that_is_at_it(postgres_url: str) -> None:
    async with bench(postgres_url) as b:
        await b.do(*[post(f"{n}") for n in range(5)])
        pruner = Pruner(b.store._writing, Rules(messages=1), patient=True)
        pruner.find()
        async with trio.open_nursery() as nursery:
            with b.store._reading.begin() as other:
                other.execute(text(f"SELECT pg_advisory_xact_lock({retention._ADVISORY_LOCK})"))
                nursery.start_soon(trio.to_thread.run_sync, pruner.step)
                waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                with trio.fail_after(10):
                    while not b.scalar(waiting):
                        await trio.sleep(0.01)
        assert pruner.step() == 4


async def test_one_node_at_a_time(postgres_url: str) -> None:
    async with bench(postgres_url) as b:
        await b.do(*[post(f"{n}") for n in range(5)])
        pruner = Pruner(b.store._writing, Rules(messages=1))
        pruner.find()
        with b.store._reading.begin() as other:
            other.execute(text(f"SELECT pg_advisory_xact_lock({retention._ADVISORY_LOCK})"))
            assert pruner.step() is None
        assert len(await contents(b)) == 5


async def test_the_command_tells_and_does(daemons: Daemons) -> None:
    """Beside a daemon whose clients are connected, and one who has been away."""
    daemon = await trio.to_thread.run_sync(partial(daemons, retention__messages=3))
    async with login(daemon, 1, {"1": None}) as here:
        for number in range(6):
            daemon.post(1, 2, f"{number}")
        await here.messages(6)
        dry = await trio.to_thread.run_sync(daemon.command, "prune", "--dry-run")
        assert dry.stdout == "3 messages would be removed.\n"
        done = await trio.to_thread.run_sync(daemon.command, "prune", "--keep", "2")
        assert (done.stdout, done.stderr, done.returncode) == ("4 messages were removed.\n", "", 0)
        daemon.post(1, 2, "more")
        assert [one["seq"] for one in await here.messages(1)] == [7]
        page = await here.request("history", conversation_id=1)
        assert [one["content"] for one in page["messages"]] == ["4", "5", "more"]
    async with login(daemon, 1, {"1": 2}) as back:
        room = back.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert (room["recovered"], [one["content"] for one in room["changes"]]) == (False, ["4", "5", "more"])
    nothing = daemon.command("prune", "--keep", "0")
    assert (nothing.returncode, "Nothing to do" in nothing.stderr) == (1, True)


async def test_the_daemon_does_it_by_itself(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatd.daemon.retention.PERIOD", 0.05)
    settings = Settings(Config())
    async with bench(database_url) as b:
        await b.do(*[post(f"{n}") for n in range(4)])
        async with trio.open_nursery() as nursery:
            await nursery.start(RetentionClock(settings, b.store.retention, first=0.0).run)
            await trio.sleep(0.2)
            assert len(await contents(b)) == 4, "off by default"
            settings.change(Config(retention=Kept(messages=1)))
            with trio.fail_after(10):
                while len(await contents(b)) > 1:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        assert await contents(b) == ["3"]
        await nothing_runs(b)


async def nothing_runs(b: Bench) -> None:
    """A search that was given up goes on in its thread, and has a connection until it ends."""
    with trio.fail_after(10):
        while b.store.retention._thread.borrowed_tokens:
            await trio.sleep(0.02)


async def test_a_cursor_at_the_cut_still_proves_itself(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change at the cut stays in the log without its message, also when that is the last one."""
    monkeypatch.setattr(retention, "BATCH", 3)
    async with bench(database_url) as b:
        for number in range(10):
            await b.do(post(f"{number}"))
        marks = [None, *(group.changes[0].mark for group in b.groups)]
        for keep in (6, 6, 3, 1):
            prune(b, messages=keep)
            low = b.scalar("SELECT low_seq FROM chat_conversations")
            assert low == 10 - keep
            assert b.scalar("SELECT count(*) FROM chat_changes") == keep + 1
            for seq in range(low, 11):
                found = await snapshot_of(b, 1, seq, mark=marks[seq])
                assert (found.recovered, len(found.changes)) == (True, 10 - seq)
                assert not (await snapshot_of(b, 1, seq, mark="another")).recovered
            assert not (await snapshot_of(b, 1, low - 1, mark=marks[low - 1])).recovered
            assert (await b.store.read(lookups.missing, 1, low, marks[low])).same
