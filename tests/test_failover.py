"""PostgreSQL fails over, for real: chatd finds the server that takes writes, and reads from no other."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from sqlalchemy import create_engine

from chatd import config
from chatd.config import Database
from chatd.core.errors import ConfigError
from chatd.store.database import migrate
from chatd.store.read import lookups
from chatd.store.sessions import Sessions
from chatd.store.urls import parse
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.replication import Address, Replication
from tests.test_doctor import inspected, wrong
from tests.test_store import Bench, bench, post

# Seconds until posts are stored again, where the old server closes its connections or says that it is none for
# writes. What chatd needs is the time of one connection; the rest is for a busy machine.
SOON = 3.0
# The same where the old server falls silent: the writer's deadline, one connection that fails, and a tick.
SILENT = 15.0 + 5.0 + 3.0


@pytest.fixture
def replication(tmp_path: Path) -> Iterator[Replication]:
    with Replication(tmp_path / "replication") as two:
        migrate(Database(url=two.url))
        yield two


def attempt(daemon: Daemon, content: str, conversation_id: int = 1) -> int:
    """The status of a post, which may fail."""
    body = {"conversation_id": conversation_id, "sender_id": 1, "content": content, "client_id": content}
    return daemon.request("POST", "/api/ws/messages", body).status


def post_until_stored(daemon: Daemon, content: str, within: float) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    while attempt(daemon, content) != 200:
        assert time.monotonic() - began < within, f"no post was stored within {within} s:\n{daemon.log[-2000:]}"
        time.sleep(0.05)
    return time.monotonic() - began


def newest(daemon: Daemon, conversation_id: int = 1) -> str | None:
    answer = daemon.get(f"/api/ws/conversations/{conversation_id}/messages")
    return answer.json["messages"][-1]["content"] if answer.status == 200 else None


def test_a_url_may_name_several_hosts() -> None:
    for url in ("postgresql://u:p,w@h1:5432,h2/db?sslmode=require", "postgresql://u:p,w@h1,[::1]:6/db"):
        parsed = parse(url)
        assert (parsed.username, parsed.password, parsed.database) == ("u", "p,w", "db")
        assert parsed.query["host"] in ("h1,h2", "h1,::1")
        assert parsed.query["port"] in ("5432,5432", "5432,6")
    assert parse("postgresql://u:p,w@h/db").host == "h"


@pytest.mark.parametrize("target", ["any", "standby", "prefer-standby", "read-only"])
def test_a_url_that_may_lead_to_a_standby_is_refused(target: str) -> None:
    environ = {"CHATD_DATABASE__URL": f"postgresql://u@h1,h2/db?target_session_attrs={target}"}
    with pytest.raises(ConfigError, match="read-write"):
        config.load(None, environ | {"CHATD_API__INTERNAL_TOKEN": "x" * 32})


def test_posts_go_on_after_a_failover(replication: Replication, daemons: Daemons) -> None:
    daemon = daemons(database__url=replication.url)
    daemon.post(1, 1, "before")
    replication.catch_up()
    replication.fail_over()
    post_until_stored(daemon, "after", SOON)
    assert newest(daemon) == "after"


def test_an_address_that_leads_to_the_old_server_for_a_while(
    replication: Replication, daemons: Daemons
) -> None:
    """It is up again as a standby, which answers reads. Nothing is read there, and nothing stays there."""
    address = Address(replication.primary.port)
    try:
        daemon = daemons(database__url=address.url)
        daemon.post(1, 1, "before")
        replication.catch_up()
        replication.switch_over()
        for number in range(3):
            assert attempt(daemon, f"meanwhile {number}") == 503
            assert newest(daemon) is None, "a standby may lag behind: nothing is read there"
        address.leads_to = replication.primary.port
        post_until_stored(daemon, "after", SOON)
        replication.standby.execute("SELECT pg_wal_replay_pause()")
        for number in range(20):
            daemon.post(1, 1, f"own {number}")
            assert newest(daemon) == f"own {number}"
        theirs = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chatd'"
        assert replication.standby.scalar(theirs) == 0
    finally:
        address.close()


async def test_a_server_that_stops_taking_writes_is_left_at_once(replication: Replication) -> None:
    """Without the end of a session: it is made read-only, as a planned move does, and another takes over."""
    address = Address(replication.primary.port)
    try:
        async with bench(address.url) as b:
            assert await b.do(post("a"))
            old = replication.primary
            await trio.to_thread.run_sync(replication.catch_up)
            old.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            old.execute("SELECT pg_reload_conf()")
            old.wait_for("SELECT current_setting('default_transaction_read_only') = 'on'")
            replication.standby.promote()
            address.leads_to = replication.standby.port
            replication.standby.execute("UPDATE chat_conversations SET last_seq = 77")
            heads = await b.store.read(lookups.heads, [1])
            assert heads[1].seq == 77, "the very next read is one of the new server"
            assert (await b.do(post("b")))[0].seq == 78
    finally:
        address.close()


async def test_a_new_session_that_finds_another_server_ends_the_others(replication: Replication) -> None:
    """Nobody has stopped the old primary: it goes on taking writes, which are lost."""
    address = Address(replication.primary.port)
    try:
        async with bench(address.url) as b:
            assert await b.do(post("a"))
            await read_at_once(b, 4)
            await trio.to_thread.run_sync(replication.catch_up)
            replication.standby.promote()
            address.leads_to = replication.standby.port
            mine = "pid <> pg_backend_pid() AND application_name = 'chatd'"
            one = f"SELECT pid FROM pg_stat_activity WHERE {mine} LIMIT 1"
            replication.primary.execute(f"SELECT pg_terminate_backend(({one}))")
            replication.standby.execute("UPDATE chat_conversations SET last_seq = 77")
            while (await read_at_once(b, 4)) != {77}:
                await trio.sleep(0.01)  # until the one that was ended is used
            outcomes = await b.do(post("b"))
            assert outcomes[0] == "unavailable" or outcomes[0].seq == 78
    finally:
        address.close()


async def read_at_once(b: Bench, count: int) -> set[int]:
    """The heads that so many sessions see."""
    found: set[int] = set()

    async def read() -> None:
        found.add((await b.store.read(_slow_heads))[1].seq)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(read)
    return found


def _slow_heads(connection: Any) -> dict[int, lookups.Heads]:
    connection.exec_driver_sql("SELECT pg_sleep(0.1)")
    return lookups.heads(connection, [1])


def test_a_server_that_falls_silent_is_given_up_once_another_has_taken_over(
    replication: Replication, daemons: Daemons
) -> None:
    """It is stopped in the middle of everything: its kernel takes what it is sent, and nothing comes back."""
    daemon = daemons(database__url=replication.url)
    daemon.post(1, 1, "before")
    replication.catch_up()
    frozen = replication.primary
    frozen.pause()
    try:
        replication.standby.promote()
        post_until_stored(daemon, "after", SILENT)
        assert newest(daemon) == "after"
    finally:
        frozen.resume()


def test_doctor_says_what_a_failover_would_cost(replication: Replication, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, database__url=replication.url)

    def said(text: str) -> str:
        (one,) = [one for one in inspected(daemon) if text in one["found"]]
        return str(one["level"])

    assert said("only asynchronous standbys (1)") == "warning"
    replication.make_synchronous()
    assert said("commits wait for a standby") == "ok"
    replication.standby.stop()
    replication.primary.wait_for("SELECT count(*) = 0 FROM pg_stat_replication")
    assert said("messages wait for a standby") == "problem"


def test_doctor_finds_no_server_that_takes_writes(replication: Replication, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, database__url=replication.standby.url)
    assert "read-only" in wrong(inspected(daemon))["database"]


def test_a_look_at_a_server_that_lets_in_and_hangs_ends(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that freezes just then: its own timeouts do not run, and its TCP acknowledges all."""
    monkeypatch.setattr("chatd.store.sessions.ANSWER_SECONDS", 0.5, raising=False)
    frozen: list[int] = []

    def connect() -> Any:
        driver = psycopg.connect(postgres_url)
        frozen.append(driver.info.backend_pid)
        os.kill(frozen[0], signal.SIGSTOP)
        return driver

    looking = Sessions()
    looking.watch(create_engine("postgresql+psycopg://"), connect)
    thread = threading.Thread(target=looking.look, daemon=True)
    thread.start()
    try:
        thread.join(5)
        assert not thread.is_alive()
    finally:
        os.kill(frozen[0], signal.SIGCONT)
