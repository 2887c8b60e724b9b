"""`chatd user export` and `erase`: everything of one user, and nothing of anybody else, on both databases."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from sqlalchemy import select

from chatd.store import schema
from chatd.store.upkeep.erasure import Erasure, export, forget
from chatd.store.write.commands import Delete, Notify
from tests.client import connect, login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import RedisServer
from tests.test_store import bench, post

SECRET = "a-word-that-is-nowhere-else"


def fill(daemon: Daemon) -> list[int]:
    """User 5 has said things, reacted and read; user 6, too. The ids of what 5 has said."""
    ids = [daemon.post(1, 5, f"{SECRET} {n}", meta={"note": SECRET}, client_id=f"c{n}")["id"] for n in range(3)]
    theirs = daemon.post(1, 6, "of somebody else", client_id="c0")["id"]
    daemon.request("PATCH", f"/api/ws/messages/{ids[0]}", {"content": f"{SECRET} edited"})
    return [*ids, theirs]


def files_that_tell(directory: Path) -> list[Path]:
    return [one for one in directory.glob("chatd.db*") if SECRET.encode() in one.read_bytes()]


async def react(daemon: Daemon, user_id: int, message_id: int) -> None:
    async with login(daemon, user_id, {"1": None}) as client:
        done = await client.request("react", conversation_id=1, id=message_id, emoji="👍", on=True)
        read = await client.request("read", conversation_id=1, id=message_id)
        assert (done["event"], read["event"]) == ("ok", "ok")


async def test_everything_of_a_user_is_handed_out(daemons: Daemons, tmp_path: Path) -> None:
    daemon = await trio.to_thread.run_sync(daemons)
    *_, theirs = await trio.to_thread.run_sync(fill, daemon)
    await react(daemon, 5, theirs)
    done = await trio.to_thread.run_sync(daemon.command, "user", "export", "5")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    tables = [row["table"] for row in rows]
    assert tables == ["chat_members", "message_reads", "chat_reactions", *["chat_messages"] * 3]
    assert {row["user_id"] for row in rows} == {5}
    assert [row["content"] for row in rows[3:]] == [f"{SECRET} edited", f"{SECRET} 1", f"{SECRET} 2"]
    assert rows[-1]["meta"] == {"note": SECRET}
    file = tmp_path / "five.jsonl"
    export = partial(daemon.command, "user", "export", "5", "--output", str(file))
    assert (await trio.to_thread.run_sync(export)).stdout == f"{file}: 6 rows.\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "File exists" in (await trio.to_thread.run_sync(export)).stderr


async def test_everything_of_a_user_is_erased(daemons: Daemons, database_url: str) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, database__url=database_url))
    *_, theirs = await trio.to_thread.run_sync(fill, daemon)
    await react(daemon, 5, theirs)
    old = daemon.token_for(5)
    done = await trio.to_thread.run_sync(daemon.command, "user", "erase", "5", "--yes", "--wait", "0")
    assert (done.stdout, done.returncode) == ("Erased: 3 messages.\n", 0), done.stderr
    messages = daemon.get("/api/ws/conversations/1/messages").json["messages"]
    assert [one["content"] for one in messages] == [None, None, None, "of somebody else"]
    assert all(one["meta"] is None and one["client_id"] is None for one in messages[:3])
    assert "reactions" not in messages[3]
    export = await trio.to_thread.run_sync(daemon.command, "user", "export", "5")
    rows = [json.loads(line) for line in export.stdout.splitlines()]
    assert [row["table"] for row in rows] == ["chat_users", *["chat_messages"] * 3]
    assert SECRET not in export.stdout
    async with connect(daemon.ws_url) as client:
        await client.send("auth", ref=1, token=old)
        assert (await client.closed())[0] == 4503
    if database_url.startswith("sqlite"):
        assert files_that_tell(Path(database_url.removeprefix("sqlite:///")).parent) == []
    again = await trio.to_thread.run_sync(daemon.command, "user", "erase", "5", "--yes", "--wait", "0")
    assert again.stdout == "Erased: 0 messages.\n"


async def test_clients_see_it_happen(daemons: Daemons) -> None:
    """Within a sweep: the command runs beside the daemon, and tells it nothing."""
    daemon = await trio.to_thread.run_sync(daemons)
    *ids, theirs = await trio.to_thread.run_sync(fill, daemon)
    await react(daemon, 5, theirs)
    async with login(daemon, 6, {"1": None}) as here, login(daemon, 5, {"1": None}) as gone:
        head = here.ready["rooms"]["1"]["seq"]  # type: ignore[attr-defined]
        await trio.to_thread.run_sync(daemon.command, "user", "erase", "5", "--yes", "--wait", "0")
        seen: list[dict[str, Any]] = [await one_of(here) for _ in range(4)]
        assert [one["seq"] for one in seen] == list(range(head + 1, head + 5))
        assert [(one["event"], one["id"], one["content"]) for one in seen[:3]] == [
            ("message.deleted", id, None) for id in ids
        ]
        assert (seen[3]["id"], seen[3].get("reactions")) == (theirs, None)
        assert (await gone.closed(15.0))[0] == 4503


async def one_of(client: Any) -> dict[str, Any]:
    """The next change, however long the sweep takes."""
    while True:
        found = await client.next(15.0)
        if found["event"].startswith("message"):
            return dict(found)


async def test_what_other_services_read_is_erased_too(daemons: Daemons, redis_server: RedisServer) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, redis__url=redis_server.url))
    await trio.to_thread.run_sync(fill, daemon)
    with redis.Redis.from_url(redis_server.url) as client:
        while client.xlen("chat.stream") < 5:  # type: ignore[operator]
            await trio.sleep(0.02)
        done = await trio.to_thread.run_sync(daemon.command, "user", "erase", "5", "--yes", "--wait", "0")
        assert (done.stdout, done.returncode) == ("Erased: 3 messages, 4 entries of chat.stream.\n", 0)
        left = [fields[b"m"] for _, fields in client.xrange("chat.stream")]  # type: ignore[union-attr]
        assert not [one for one in left if SECRET.encode() in one]
        assert [one for one in left if b"of somebody else" in one]


# Beside the daemon, without one.


async def test_what_is_said_until_connections_end_goes_too(database_url: str) -> None:
    """`settle` returns when a daemon has ended them. Until then posts are committed."""
    async with bench(database_url) as b:
        await b.do(post(SECRET, user_id=5))

        def settle() -> None:
            trio.from_thread.run(b.do, post(f"{SECRET}, last words", user_id=5, conversation_id=2))

        erasure = Erasure(b.store._writing, 5, None, lambda count: None)
        assert await trio.to_thread.run_sync(erasure.run, settle) == 2
        assert b.scalar("SELECT count(*) FROM chat_messages WHERE content IS NOT NULL") == 0
        assert b.scalar("SELECT count(*) FROM chat_members") == 0


async def test_what_was_still_to_be_told_is_erased(database_url: str) -> None:
    async with bench(database_url, node="one") as b:
        await b.do(post(SECRET, user_id=5), post("of somebody else", user_id=6))
        told = [{"user_id": 5, "content": SECRET}, {"user_id": 6, "content": "of somebody else"}]
        told.append({"user_id": 5, "content": None, "meta": {"note": SECRET}})
        bodies = [json.dumps({"event": "message.created", "data": one}).encode() for one in told]
        await b.do(*[Notify(event="message.created", body=body) for body in bodies])
        await trio.to_thread.run_sync(Erasure(b.store._writing, 5, "two", lambda count: None).run)
        with b.store._reading.connect() as connection:
            outbox = b"".join(connection.scalars(select(schema.outbox.c.payloads)))
            waiting = list(connection.scalars(select(schema.webhooks.c.body)))
        assert SECRET.encode() not in outbox
        assert outbox.count(b"of somebody else") == 1
        assert outbox.count(b"message.deleted") == 1
        assert waiting == [bodies[1]]


async def test_what_the_user_had_deleted_is_nameless_too(database_url: str) -> None:
    async with bench(database_url) as b:
        (one,) = await b.do(post(SECRET, user_id=5, client_id="c1"))
        await b.do(Delete(message_id=one.id))
        erasure = Erasure(b.store._writing, 5, None, lambda count: None)
        for _ in range(2):
            assert await trio.to_thread.run_sync(erasure.run) == 0
        assert b.scalar("SELECT client_id FROM chat_messages") is None
        assert bytes(b.scalar("SELECT request_hash FROM chat_messages")) == bytes(16)
        assert b.scalar("SELECT last_seq FROM chat_conversations") == 2


async def test_nothing_is_left_in_sqlites_files_even_in_place(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/chatd.db"
    async with bench(url) as b:
        await b.do(*[post(f"{SECRET} {n}", user_id=5, client_id=f"{SECRET} {n}") for n in range(300)])
        assert files_that_tell(tmp_path)
        await trio.to_thread.run_sync(Erasure(b.store._writing, 5, None, lambda count: None).run)
        assert forget(b.store._writing, anew=False)
        assert files_that_tell(tmp_path) == []


async def test_a_slow_reader_of_an_export_delays_nobody(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post(f"{n}", user_id=5) for n in range(250)])
        rows = export(b.store._writing, 5)
        first = [next(rows), next(rows)]
        await b.do(post("meanwhile"))
        assert [row["table"] for row in first] == ["chat_members", "chat_messages"]
        assert [row["content"] for row in rows] == [f"{n}" for n in range(1, 250)]


@pytest.mark.service
def test_it_asks_first(tmp_path: Path) -> None:
    done = Daemon(tmp_path).command("user", "erase", "5")
    assert (done.returncode, "Aborted" in done.stderr) == (1, True)
