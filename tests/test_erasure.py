"""`chatd user export` and `erase`: everything of one user, and nothing of anybody else, on both databases."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import redis
import trio

from tests.client import connect, login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import RedisServer

SECRET = "a-word-that-is-nowhere-else"


def fill(daemon: Daemon) -> list[int]:
    """User 5 has said things, reacted and read; user 6, too. The ids of what 5 has said."""
    ids = [daemon.post(1, 5, f"{SECRET} {n}", meta={"note": SECRET}, client_id=f"c{n}")["id"] for n in range(3)]
    theirs = daemon.post(1, 6, "of somebody else", client_id="c0")["id"]
    daemon.request("PATCH", f"/api/ws/messages/{ids[0]}", {"content": f"{SECRET} edited"})
    return [*ids, theirs]


async def react(daemon: Daemon, user_id: int, message_id: int) -> None:
    async with login(daemon, user_id, {"1": None}) as client:
        done = await client.request("react", conversation_id=1, id=message_id, emoji="👍", on=True)
        read = await client.request("read", conversation_id=1, id=message_id)
        assert (done["event"], read["event"]) == ("ok", "ok")


async def test_everything_of_a_user_is_handed_out(daemons: Daemons, database_url: str, tmp_path: Path) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, database__url=database_url))
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
        file = Path(database_url.removeprefix("sqlite:///"))
        for one in file.parent.glob(f"{file.name}*"):
            assert SECRET.encode() not in one.read_bytes(), one
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


def test_it_asks_first(daemons: Daemons) -> None:
    daemon = daemons()
    fill(daemon)
    done = daemon.command("user", "erase", "5")
    assert (done.returncode, "Aborted" in done.stderr) == (1, True)
    assert SECRET in daemon.get("/api/ws/conversations/1/messages").body.decode()
