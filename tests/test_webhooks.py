"""Webhooks: signed, at least once, from the transaction of what they tell of; and the hook before a message."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from chatd.chat.attendance import DEBOUNCE, Attendance
from chatd.chat.hooks import BeforeMessage
from chatd.chat.presence import ROOMS, USERS, Presence
from chatd.config import Database, Webhooks
from chatd.errors import Forbidden, Unavailable
from chatd.fetch import Fetcher
from chatd.store.commands import Create, Notify
from chatd.store.database import migrate, open_store
from tests.backend import Asked, Backend, serving
from tests.client import login
from tests.conftest import Daemons
from tests.services import PostgresServer, RedisServer

SECRET = "w" * 32
ALL = {"webhooks__secret": SECRET, "webhooks__events": "message.created"}


@pytest.fixture
def backend() -> Iterator[Backend]:
    with serving() as one:
        yield one


def signed(asked: Asked) -> bool:
    moment, _, signature = asked.headers["x-chatd-signature"].partition(",v1=")
    seconds = moment.removeprefix("t=")
    wanted = hmac.digest(SECRET.encode(), f"{seconds}.".encode() + asked.body, hashlib.sha256).hex()
    return hmac.compare_digest(signature, wanted) and abs(time.time() - int(seconds)) < 60


async def until(condition: Callable[[], object], patience: float = 10.0) -> None:
    with trio.fail_after(patience):
        while not condition():
            await trio.sleep(0.02)


async def send(client: Any, *contents: str, conversation: int = 1) -> list[Any]:
    return [
        await client.request("send", conversation_id=conversation, content=content, client_id=f"k {content}")
        for content in contents
    ]


def metric(daemon: Any, name: str) -> float:
    lines = daemon.get("/metrics").body.decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def test_what_a_client_sends_is_told_signed_and_once(daemons: Daemons, backend: Backend) -> None:
    daemon = daemons(webhooks__url=f"{backend.url}/hook", **ALL)
    async with login(daemon, 7, {"1": None}) as client:
        (ok,) = await send(client, "hello")
        await send(client, "hello")  # a retry is nothing new
        told = await client.expect("message")
        daemon.post(1, 8, "by the backend, which knows")
        await send(client, "bye")
        await until(lambda: len(backend.asked) >= 2)
    await trio.sleep(0.2)
    first, second = backend.asked
    assert signed(first)
    assert first.headers["x-chatd-event"] == "message.created"
    body = first.json
    assert (body["event"], body["data"]) == ("message.created", {k: v for k, v in told.items() if k != "event"})
    assert body["data"]["id"] == ok["id"]
    assert second.json["data"]["content"] == "bye"
    assert first.headers["x-chatd-delivery"] != second.headers["x-chatd-delivery"]


async def test_it_is_retried_until_the_backend_takes_it(daemons: Daemons, backend: Backend) -> None:
    backend.answer = lambda asked: (500 if len(backend.asked) < 3 else 204, b"")
    daemon = daemons(webhooks__url=backend.url, **ALL)
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, "hello")
        await until(lambda: len(backend.asked) == 3)
    deliveries = {asked.headers["x-chatd-delivery"] for asked in backend.asked}
    assert len(deliveries) == 1
    assert all(signed(asked) for asked in backend.asked)
    assert "webhook_failed" in daemon.log
    await until(lambda: "webhook_works_again" in daemon.log)


async def test_what_is_never_taken_is_given_up_and_counted(daemons: Daemons, backend: Backend) -> None:
    backend.answer = lambda asked: (410 if asked.json["data"]["content"] == "gone" else 302, b"")
    daemon = daemons(webhooks__url=backend.url, webhooks__attempts=2, **ALL)
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, "gone", "never")
        await until(lambda: daemon.log.count("webhook_given_up") == 2)
    assert len(backend.asked) == 3
    daemon.stop()
    daemon.start()
    await until(lambda: metric(daemon, "chatd_webhooks_dead") == 2)


async def test_nothing_is_lost_by_a_kill(daemons: Daemons, backend: Backend) -> None:
    backend.answer = lambda asked: (503, b"")
    daemon = daemons(webhooks__url=backend.url, limits__sends_per_second=0, **ALL)
    contents = [str(number) for number in range(30)]
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, *contents)
        daemon.kill()
    backend.asked.clear()
    backend.answer = lambda asked: (200, b"")
    daemon.start()
    # What was claimed by the one that was killed is free again when its lease has ended.
    await until(lambda: {asked.json["data"]["content"] for asked in backend.asked} == set(contents), 30)


async def test_two_nodes_deliver_each_event_once(
    daemons: Daemons, backend: Backend, postgres: PostgresServer, redis_server: RedisServer
) -> None:
    url = postgres.create_database()
    migrate(Database(url=url))
    settings = {"database__url": url, "redis__url": redis_server.url, "webhooks__url": backend.url}
    backend.pause = 0.02
    nodes = [daemons(**settings, limits__sends_per_second=0, **ALL) for _ in range(2)]
    async with login(nodes[0], 7, {"1": None}) as one, login(nodes[1], 8, {"1": None}) as other:
        for number in range(40):
            await send(one, f"a{number}")
            await send(other, f"b{number}")
    wanted = {f"{name}{number}" for name in "ab" for number in range(40)}
    await until(lambda: {asked.json["data"]["content"] for asked in backend.asked} == wanted)
    assert len(backend.asked) == 80


async def test_presence_is_told_late_and_only_what_is_news(autojump_clock: trio.testing.MockClock) -> None:
    told: list[Notify] = []

    class Taking:
        refuse = False

        def submit(self, commands: list[Notify]) -> None:
            if self.refuse:
                raise Unavailable
            told.extend(commands)

    writer = Taking()
    presence = Presence("a", None)
    events = ["user.online", "user.offline", "room.occupied"]
    attendance = Attendance(writer, presence, events)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(attendance.run)
        presence.arrive(USERS, 1)
        presence.arrive(ROOMS, 5)
        presence.arrive(USERS, 2)
        presence.leave(USERS, 2)  # was here for a moment: no news
        await trio.sleep(DEBOUNCE + 1)
        assert [one.event for one in told] == ["user.online", "room.occupied"]
        presence.leave(USERS, 1)
        await trio.sleep(DEBOUNCE / 2)
        presence.arrive(USERS, 1)  # a tunnel
        presence.leave(ROOMS, 5)  # not wanted
        await trio.sleep(2 * DEBOUNCE)
        assert len(told) == 2
        writer.refuse = True
        presence.leave(USERS, 1)
        await trio.sleep(2 * DEBOUNCE)
        writer.refuse = False
        await trio.sleep(1)
        assert [one.event for one in told[2:]] == ["user.offline"]
        assert b'"version":' in told[2].body
        nursery.cancel_scope.cancel()


async def test_a_daemon_tells_of_presence(daemons: Daemons, backend: Backend) -> None:
    daemon = daemons(webhooks__url=backend.url, webhooks__secret=SECRET)
    async with login(daemon, 7, {"4": None}):
        await until(lambda: len(backend.asked) == 2, DEBOUNCE + 5)
    bodies = {asked.json["event"]: asked.json["data"] for asked in backend.asked}
    assert (bodies["user.online"]["user_id"], bodies["room.occupied"]["conversation_id"]) == (7, 4)
    assert bodies["user.online"]["version"] > 0


def test_the_table_is_claimed_once(database_url: str) -> None:
    store = open_store(Database(url=database_url))
    writer = store.writer(node=None, on_commit=lambda group: None)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(writer.run)
            await writer.submit([Notify(event="user.online", body=b"%d" % n) for n in range(5)]).outcomes()
            first = await store.webhooks.claim(3, lease=0.5)
            rest = await store.webhooks.claim(10, lease=0.5)
            assert [int(one.body) for one in first + rest] == [0, 1, 2, 3, 4]
            assert await store.webhooks.claim(10, lease=1) == []
            await store.webhooks.settle([one.id for one in first], [])
            await trio.sleep(0.6)  # those that were not settled are due again
            again = await store.webhooks.claim(10, lease=60)
            assert [int(one.body) for one in again] == [3, 4]
            assert await store.webhooks.counts() == (2, 0)
            nursery.cancel_scope.cancel()

    trio.run(main)
    store.close()


# The hook.


def hook(fetch: Fetcher, backend: Backend, **more: Any) -> BeforeMessage:
    return BeforeMessage(Webhooks(secret=SECRET, before_message_url=backend.url, **more), fetch)


async def test_the_hook_accepts_refuses_and_changes(backend: Backend) -> None:
    fetch = Fetcher(["127.0.0.0/8"])
    before = hook(fetch, backend)
    asked = Create(conversation_id=1, user_id=7, content="darn", client_id="k")
    backend.answer = lambda request: (200, {"action": "accept"})
    assert await before.check(asked) is asked
    assert signed(backend.asked[0])
    assert backend.asked[0].json["data"] == {
        "conversation_id": 1, "user_id": 7, "type": "text", "content": "darn", "meta": None,
        "client_id": "k", "reply_to": None,
    }  # fmt: skip
    backend.answer = lambda request: (200, {"action": "change", "content": "d**n", "meta": {"clean": True}})
    changed = await before.check(asked)
    assert (changed.content, changed.meta, changed.type) == ("d**n", {"clean": True}, "text")
    assert changed.request_hash() == asked.request_hash()
    backend.answer = lambda request: (200, {"action": "refuse", "message": "be nice"})
    with pytest.raises(Forbidden, match="be nice"):
        await before.check(asked)
    await fetch.close()


async def test_a_silent_hook_means_what_was_configured(backend: Backend) -> None:
    fetch = Fetcher(["127.0.0.0/8"])
    asked = Create(conversation_id=1, user_id=7, content="x")
    for failure in ("refuse", "accept"):
        before = hook(fetch, backend, before_message_timeout=0.2, before_message_failure=failure)
        for status, body, pause in (
            (500, {}, 0.0),
            (200, b"?", 0.0),
            (200, {"action": "x"}, 0.0),
            (200, {}, 0.4),
        ):
            backend.answer = lambda request, status=status, body=body: (status, body)  # type: ignore[misc]
            backend.pause = pause
            began = trio.current_time()
            if failure == "accept":
                assert await before.check(asked) is asked
            else:
                with pytest.raises(Unavailable):
                    await before.check(asked)
            assert trio.current_time() - began < 0.35
    await fetch.close()


async def test_a_client_meets_the_hook(daemons: Daemons, backend: Backend) -> None:
    def judge(asked: Asked) -> tuple[int, Any]:
        content = asked.json["data"]["content"]
        if content == "spam":
            return 200, {"action": "refuse", "message": "no spam"}
        if content == "long":
            return 200, {"action": "change", "content": "x" * 8001}
        return 200, {"action": "change", "content": content.upper()}

    backend.answer = judge
    daemon = daemons(webhooks__before_message_url=backend.url, webhooks__secret=SECRET)
    async with login(daemon, 7, {"1": None}) as client:
        for _ in range(2):  # the retry is one, whatever the hook makes of it
            (ok,) = await send(client, "hello")
        assert (ok["event"], ok["seq"], ok["duplicate"]) == ("ok", 1, True)
        refused, long = await send(client, "spam", "long")
        assert (refused["code"], refused["message"]) == ("forbidden", "no spam")
        assert (long["code"], long["field"]) == ("too_large", "content")
        for number in range(5):  # in order, though each waits for the backend
            await client.send("send", conversation_id=1, content=f"n{number}", ref=number + 500)
        (first, *rest) = await client.messages(6)
        assert [one["content"] for one in (first, *rest)] == ["HELLO", "N0", "N1", "N2", "N3", "N4"]
        asked = len(backend.asked)
        daemon.post(1, 8, "the backend's own")
        await client.messages(1)
        assert len(backend.asked) == asked
