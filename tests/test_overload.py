"""Too much, and too little: full queues, no descriptors, a database that is locked, frozen or gone.

Every refusal is `unavailable` in time, nobody who is connected is harmed, and it heals by itself.
"""

from __future__ import annotations

import json
import resource
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import trio

from tests.client import Client, connect, login
from tests.conftest import Daemons
from tests.daemon import Answer, Daemon
from tests.services import PostgresServer, RedisServer

BATCH = 1000
QUEUE = 10_000  # commands that may wait at the writer
WRITE_DEADLINE, READ_DEADLINE = 15.0, 10.0  # seconds until a caller is answered
SLACK = 3.0
# As limit: not one more descriptor. With a higher one, what closes a low descriptor can open it again.
NONE_LEFT = 3


async def ask(work: Callable[..., Answer], *arguments: Any) -> Answer:
    # A limiter of its own: more wait here than trio's default lets wait.
    return await trio.to_thread.run_sync(work, *arguments, limiter=trio.CapacityLimiter(1))


def post(daemon: Daemon, conversation: int, content: str, **fields: Any) -> Answer:
    body = {"conversation_id": conversation, "sender_id": 9, "content": content} | fields
    return daemon.request("POST", "/api/ws/messages", body)


def assert_unavailable(answer: Answer) -> None:
    assert (answer.status, answer.json["code"]) == (503, "unavailable"), answer.body
    assert int(answer.headers["Retry-After"]) >= 1


@contextmanager
def foreign_lock(daemon: Daemon) -> Iterator[None]:
    """Somebody else writes to the SQLite file, and takes his time."""
    with closing(sqlite3.connect(daemon.directory / "chatd.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def until_ready(daemon: Daemon, status: str, patience: float = 10.0) -> Answer:
    with trio.fail_after(patience):
        while True:
            answer = await ask(daemon.get, "/readyz")
            if answer.json["status"] == status:
                return answer
            await trio.sleep(0.1)


async def test_a_full_queue_refuses_at_once_and_a_retry_completes_it(daemons: Daemons) -> None:
    daemon = daemons(limits__sends_per_second=0)
    batches = QUEUE // BATCH + 3
    answers: list[Answer] = []

    async def send(number: int) -> None:
        messages = [
            {"conversation_id": 1, "sender_id": 9, "content": f"{number}", "client_id": f"{number}-{n}"}
            for n in range(BATCH)
        ]
        body = {"messages": messages}
        answers.append(await ask(daemon.request, "POST", "/api/ws/messages/batch", body))

    async with login(daemon, 1, {"2": None}) as ada, trio.open_nursery() as nursery:
        with foreign_lock(daemon):
            for number in range(batches):
                nursery.start_soon(send, number)
            with trio.fail_after(4):  # the writer itself waits for five seconds
                while not answers:
                    await trio.sleep(0.02)
            assert_unavailable(answers[0])
            with trio.fail_after(1):
                assert_unavailable(await ask(post, daemon, 1, "one more"))
                sent = await ada.request("send", conversation_id=2, content="one more")
                assert (sent["event"], sent["code"]) == ("error", "unavailable")
                assert (sent["retryable"], sent["retry_after"]) == (True, 1.0)
                assert (await ada.request("ping"))["event"] == "pong"
    assert len(answers) == batches
    answers.clear()
    for number in range(batches):  # the same again: whatever became of the first, there is one row of each
        await send(number)
    results = [result for answer in answers for result in answer.json["results"]]
    assert sorted(result["seq"] for result in results) == list(range(1, batches * BATCH + 1))


# 60 kB of JSON, and twenty times as much memory when it is decoded.
LISTS: list[Any] = [[]] * 20_000
DECODED = 20_000 * 64


def compact(body: Any) -> str:
    return json.dumps(body, separators=(",", ":"))


def peak_memory(daemon: Daemon) -> int:
    """The most bytes that have been resident."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


async def send_batches(daemon: Daemon, count: int) -> None:
    each = 30
    message = {"conversation_id": 1, "sender_id": 9, "content": "x", "meta": LISTS}
    body = compact({"messages": [message] * each}).encode()
    async with trio.open_nursery() as nursery:
        for _ in range(count // each):
            nursery.start_soon(ask, daemon.request, "POST", "/api/ws/messages/batch", body)


async def send_singly(daemon: Daemon, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(ask, partial(post, meta=LISTS), daemon, 1, "x")


async def send_as_clients(daemon: Daemon, count: int) -> None:
    each = 10

    async def send(client: Client) -> None:
        for number in range(each):
            command = {"event": "send", "ref": number, "conversation_id": 1, "content": "x", "meta": LISTS}
            await client.ws.send_message(compact(command))
        for _ in range(each):
            await client.next(WRITE_DEADLINE + SLACK)

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(login(daemon, 100 + n)) for n in range(count // each)]
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(send, client)


@pytest.mark.parametrize("send", [send_batches, send_singly, send_as_clients])
async def test_what_waits_takes_no_more_memory_than_it_came_in(
    daemons: Daemons, send: Callable[[Daemon, int], Awaitable[None]]
) -> None:
    daemon = daemons(limits__sends_per_second=0, limits__meta_bytes=3 * len(LISTS) + 1)
    before, count = peak_memory(daemon), 120

    async def hold_the_writer(*, task_status: trio.TaskStatus[None]) -> None:
        with foreign_lock(daemon):
            task_status.started()
            await ask(post, daemon, 1, "waits for the lock alone, and all that follows for the writer")

    async with trio.open_nursery() as nursery:
        await nursery.start(hold_the_writer)
        await send(daemon, count)
    assert peak_memory(daemon) - before < count * DECODED * 2 / 3  # a group that is being written among it


async def test_a_locked_database_is_said_and_heals_without_traffic(daemons: Daemons) -> None:
    daemon = daemons()
    async with login(daemon, 1, {"1": None}) as ada:
        await ask(post, daemon, 1, "before")
        await ada.expect("message", content="before")
        with foreign_lock(daemon):
            with trio.fail_after(5 + SLACK):
                assert_unavailable(await ask(partial(post, client_id="key"), daemon, 1, "locked out"))
            locked = await until_ready(daemon, "unavailable")
            assert (locked.status, locked.json["checks"]) == (
                503,
                {"database": "read_only", "migrations": "ok"},
            )
            with trio.fail_after(1):  # who reads does not wait for who writes
                page = await ask(daemon.get, "/api/ws/conversations/1/messages")
                assert [m["content"] for m in page.json["messages"]] == ["before"]
                assert (await ada.request("history", conversation_id=1))["event"] == "history"
        await until_ready(daemon, "ok", patience=5 + SLACK)
        retried = await ask(partial(post, client_id="key"), daemon, 1, "locked out")
        assert (retried.status, retried.json["seq"]) == (200, 2)
        assert (await ada.expect("message"))["content"] == "locked out"
        await ada.silence()


async def test_a_frozen_postgresql_is_answered_for_in_time_and_heals(
    daemons: Daemons, postgres_url: str, postgres: PostgresServer, own_redis: RedisServer
) -> None:
    """Connections are open and nothing answers. What needs no database goes on; no restart is needed."""
    daemon = await trio.to_thread.run_sync(
        partial(
            daemons,
            database__url=postgres_url,
            redis__url=own_redis.url,
            redis__accept_foreign="true",
            limits__sends_per_second=0,
        )
    )
    await until_ready(daemon, "ok")
    outcomes: dict[str, Answer] = {}

    async def try_it(name: str, deadline: float, work: Callable[..., Answer], *arguments: Any) -> None:
        with trio.fail_after(deadline + SLACK):
            outcomes[name] = await ask(work, *arguments)

    async with login(daemon, 1, {"1": None}) as ada, login(daemon, 2, {"1": None}) as grace:
        assert (await ask(post, daemon, 1, "before")).status == 200
        await grace.expect("message", content="before")
        postgres.pause()
        try:
            async with trio.open_nursery() as nursery:
                for number in range(8):  # more than there are readers
                    path = "/api/ws/conversations/1/messages"
                    nursery.start_soon(try_it, f"read {number}", READ_DEADLINE, daemon.get, path)
                unanswered = partial(post, client_id="key")
                nursery.start_soon(try_it, "write", WRITE_DEADLINE, unanswered, daemon, 1, "unanswered")
                await trio.sleep(1)
                foreign = b'{"event":"tick","conversation_id":1}'
                with closing(redis.Redis.from_url(own_redis.url, protocol=2)) as somebody:
                    assert somebody.publish("chat.messages", foreign) == 1
                assert (await grace.expect("tick", patience=2))["conversation_id"] == 1
                with trio.fail_after(2):
                    assert (await ada.request("ping"))["event"] == "pong"
                await ada.send("send", ref=7, conversation_id=1, content="unanswered too", client_id="key 2")
                assert (await ask(daemon.get, "/readyz")).status == 503
            assert len(outcomes) == 9
            for outcome in outcomes.values():
                assert_unavailable(outcome)
            assert (await ada.expect("error", ref=7, patience=SLACK + 2))["code"] == "unavailable"
        finally:
            postgres.resume()
        await until_ready(daemon, "ok", patience=15)
        first = await ask(partial(post, client_id="key"), daemon, 1, "unanswered")
        assert first.status == 200
        await ada.request("send", conversation_id=1, content="unanswered too", client_id="key 2")
        heard = [m["content"] for m in await grace.messages(2)]
        assert sorted(heard) == ["unanswered", "unanswered too"], "each once, whenever it was committed"
        await grace.silence()
        assert daemon.log.count("Traceback") == 0


async def test_a_postgresql_that_crashes_and_comes_back_needs_no_restart_of_chatd(
    daemons: Daemons, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with PostgresServer(tmp_path_factory.mktemp("own-postgres")) as own:
        daemon = Daemon(tmp_path_factory.mktemp("daemon"), database__url=own.url)
        assert daemon.command("migrate").returncode == 0
        daemon.start()
        try:
            async with login(daemon, 1, {"1": None}) as ada:
                assert (await ask(post, daemon, 1, "before")).status == 200
                token = await trio.to_thread.run_sync(daemon.token_for, 2)
                await trio.to_thread.run_sync(own.kill)
                with trio.fail_after(SLACK):
                    assert_unavailable(await ask(post, daemon, 1, "refused"))
                    assert_unavailable(await ask(daemon.get, "/api/ws/conversations/1/messages"))
                    refused = await ada.request("history", conversation_id=1)
                    assert (refused["code"], refused["retryable"]) == ("unavailable", True)
                    again = await ada.request("subscribe", conversation_id=1, after=1)
                    assert again["code"] == "unavailable"  # and she is in the room as before
                async with connect(daemon.ws_url) as late:
                    await late.next()
                    await late.send("auth", ref=1, token=token)
                    assert (await late.expect("error", ref=1))["code"] == "unavailable"
                    assert (await late.closed())[0] == 4005, "come again: this is nobody's fault but ours"
                await trio.to_thread.run_sync(own.start)
                await until_ready(daemon, "ok")
                assert (await ask(post, daemon, 1, "after")).status == 200
                assert [m["content"] for m in await ada.messages(2)] == ["before", "after"]
        finally:
            daemon.close()


# Descriptors.


async def test_clients_never_take_the_last_descriptors(daemons: Daemons) -> None:
    """As many connect as there are; the API goes on, the others wait, and come in when somebody leaves."""
    few = 200
    daemon = await trio.to_thread.run_sync(partial(daemons, open_files=few))
    idle: list[socket.socket] = []
    try:
        async with login(daemon, 1, {"1": None}) as ada:
            for _ in range(2 * few):
                idle.append(socket.create_connection(("127.0.0.1", daemon.hub_port)))
            await trio.sleep(0.5)
            with trio.fail_after(2):  # well before the first of them has had its time for a handshake
                for number in range(3):
                    assert (await ask(post, daemon, 1, f"m{number}")).status == 200
                    assert (await ada.expect("message"))["content"] == f"m{number}"
            with trio.move_on_after(0.5) as waiting:
                async with connect(daemon.ws_url) as late:
                    await late.next()
            assert waiting.cancelled_caught, "there was a place left"
            for one in idle:
                one.close()
            async with login(daemon, 2, {"1": 0}) as late:
                assert len(late.ready["rooms"]["1"]["changes"]) == 3  # type: ignore[attr-defined]
    finally:
        for one in idle:
            one.close()
    assert "EMFILE" not in daemon.log


async def test_without_descriptors_redis_and_the_database_are_away_and_nothing_ends(
    daemons: Daemons, postgres_url: str, own_redis: RedisServer
) -> None:
    """Both links break while there is none left to make them anew; what fails then is no error of chatd's."""
    daemon = await trio.to_thread.run_sync(
        partial(daemons, database__url=postgres_url, redis__url=own_redis.url)
    )
    await until_ready(daemon, "ok")
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    async with login(daemon, 1, {"1": None}) as ada:
        assert (await ask(post, daemon, 1, "before")).status == 200
        await ada.expect("message", content="before")
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (NONE_LEFT, before[1]))
        await trio.to_thread.run_sync(own_redis.kill)
        with psycopg.connect(postgres_url, autocommit=True) as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'chatd' AND datname = current_database()"
            )
        await trio.to_thread.run_sync(own_redis.start)
        for number in range(3):
            sent = await ada.request("send", conversation_id=1, content=f"refused {number}")
            assert (sent["event"], sent["code"]) == ("error", "unavailable")
            history = await ada.request("history", conversation_id=1)
            assert (history["event"], history["code"]) == ("error", "unavailable")
            await trio.sleep(1.0)  # the sweep, the outbox and the links try, too
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        await until_ready(daemon, "ok", patience=15)
        assert (await ask(post, daemon, 1, "after")).status == 200
        assert (await ada.expect("message"))["content"] == "after"
    assert "Traceback" not in daemon.log


async def test_without_descriptors_the_accepting_pauses_quietly_and_heals(daemons: Daemons) -> None:
    """The limit is lowered under the running daemon: not even the places it reckoned with are there."""
    daemon = await trio.to_thread.run_sync(daemons)
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    async with login(daemon, 1, {"1": None}) as ada:
        await ask(post, daemon, 1, "before")
        await ada.expect("message")
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (NONE_LEFT, before[1]))
        with closing(socket.create_connection(("127.0.0.1", daemon.hub_port))) as waiting:
            await trio.sleep(1.0)  # ten tries to accept it
            sent = await ada.request("send", conversation_id=1, content="by who was there already")
            assert sent["event"] == "ok"
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
            waiting.settimeout(5)
            waiting.sendall(b"GET /nowhere HTTP/1.1\r\n\r\n")
            assert await trio.to_thread.run_sync(waiting.recv, 12) == b"HTTP/1.1 400"
        assert (await ask(post, daemon, 1, "after")).status == 200
    lines = [line for line in daemon.log.splitlines() if "EMFILE" in line]
    assert len(lines) == 1, "one line says it, not ten a second"
    assert "Traceback" not in daemon.log
