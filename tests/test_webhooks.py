"""Webhooks: signed, at least once, from the transaction of what they tell of; and the hook before a message."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import signal
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import trio
import trio.testing
from sqlalchemy import update

from chatd.backend.before_message import BeforeMessage
from chatd.backend.breaker import MOST, REST
from chatd.backend.fetch import Answer, Fetcher
from chatd.backend.webhooks import AT_ONCE, CLAIM, COUNT, FAILURES, LOOK, REST_MOST, RETRY_MOST, WebhookDelivery
from chatd.chat.presence_webhooks import DEBOUNCE
from chatd.config import Database, Webhooks
from chatd.core import callbacks
from chatd.core.errors import CallFailed, Forbidden, Unavailable
from chatd.store import schema
from chatd.store.database import migrate, open_store
from chatd.store.queues.webhooks import Failed, Waiting
from chatd.store.write.commands import Create, Notify
from tests.backend import Asked, Backend, serving
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
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
    """One with labels is not shown before it was first counted."""
    lines = daemon.get("/metrics").body.decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


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
    data = {key: value for key, value in told.items() if key not in ("event", "mark")}
    assert (body["event"], body["data"]) == ("message.created", data)
    assert body["data"]["id"] == ok["id"]
    assert second.json["data"]["content"] == "bye"
    assert first.headers["x-chatd-delivery"] != second.headers["x-chatd-delivery"]


STANDARD = "whsec_" + b64encode(bytes(range(200, 232))).decode()


@pytest.mark.parametrize("secret", [SECRET, STANDARD, STANDARD.rstrip("=")], ids=["plain", "whsec", "unpadded"])
async def test_standard_webhooks_verify_what_is_sent(daemons: Daemons, backend: Backend, secret: str) -> None:
    standard = pytest.importorskip("standardwebhooks.webhooks")
    backend.answer = lambda asked: (200, {"action": "accept"})
    daemon = daemons(
        webhooks__url=f"{backend.url}/events",
        webhooks__before_message_url=f"{backend.url}/before",
        webhooks__secret=secret,
    )
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, "grüß dich 👋")
        await until(lambda: {one.path for one in backend.asked} >= {"/events", "/before"})
    library = standard.Webhook(secret if secret.startswith("whsec_") else secret.encode())
    for one in backend.asked:
        assert library.verify(one.body, one.headers) == one.json
        moment, _, signature = one.headers["x-chatd-signature"].partition(",v1=")
        content = moment.removeprefix("t=").encode() + b"." + one.body
        assert hmac.digest(secret.encode(), content, "sha256").hex() == signature, "as it is written"
        for headers in (one.headers | {"webhook-id": "1"}, one.headers | {"webhook-timestamp": "1"}):
            with pytest.raises(standard.WebhookVerificationError):
                library.verify(one.body, headers)
        with pytest.raises(standard.WebhookVerificationError):
            library.verify(one.body.replace(b"7", b"8"), one.headers)


async def test_an_event_has_the_same_id_each_time_it_is_tried(daemons: Daemons, backend: Backend) -> None:
    backend.answer = lambda asked: (500 if len(backend.asked) < 3 else 200, {})
    daemon = daemons(webhooks__url=backend.url, **ALL)
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, "hello")
        await until(lambda: len(backend.asked) == 3)
        await send(client, "again")
        await until(lambda: len(backend.asked) == 4)
    ids = [one.headers["webhook-id"] for one in backend.asked]
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert not any("." in id for id in ids)


def test_a_database_that_goes_back_gives_no_id_twice() -> None:
    """It gives the numbers again, and to other events."""
    before, after = (callbacks.body("message.created", {"id": 1, "content": text}) for text in "ab")
    assert callbacks.id_of(1, before) == callbacks.id_of(1, before) != callbacks.id_of(1, after)


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
        await until(lambda: metric(daemon, "chatd_webhooks_dead") == 2)
    assert len(backend.asked) == 3
    assert daemon.log.count("webhook_given_up") == 1, "a line an incident"
    assert metric(daemon, "chatd_webhooks_failed_total") == 3


async def test_nothing_is_lost_by_a_kill(daemons: Daemons, backend: Backend, database_url: str) -> None:
    backend.answer = lambda asked: (503, b"")
    daemon = daemons(
        database__url=database_url,
        webhooks__url=backend.url,
        webhooks__timeout=0.5,
        limits__sends_per_second=0,
        **ALL,
    )
    contents = [str(number) for number in range(30)]
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, *contents)
        daemon.kill()
    backend.asked.clear()
    backend.answer = lambda asked: (200, b"")
    daemon.start()
    # What was claimed by the one that was killed is free again when its lease has ended.
    await until(lambda: {asked.json["data"]["content"] for asked in backend.asked} == set(contents), 30)


async def test_a_stop_finishes_what_is_on_its_way_and_frees_the_rest(
    daemons: Daemons, backend: Backend, database_url: str
) -> None:
    """Each is delivered once, and the next daemon need not wait for a lease to end."""
    daemon = daemons(database__url=database_url, webhooks__url=backend.url, limits__sends_per_second=0, **ALL)
    contents = [str(number) for number in range(50)]
    async with login(daemon, 7, {"1": None}) as client:
        backend.pause = 0.5
        for content in contents:
            await client.send("send", conversation_id=1, content=content, ref=int(content))
        await client.messages(len(contents))
        await until(lambda: len(backend.asked) > 10)
        daemon.signal(signal.SIGTERM)
        await trio.to_thread.run_sync(daemon.wait)
    assert len(backend.asked) < len(contents)
    backend.pause = 0.0
    daemon.start()
    await until(lambda: len(backend.asked) >= len(contents), 5)
    assert {asked.json["data"]["content"] for asked in backend.asked} == set(contents)
    await until(lambda: metric(daemon, 'chatd_webhooks_sent_total{event="message.created"}') > 0)
    assert len(backend.asked) == len(contents)


async def test_an_odd_answer_harms_nothing(daemons: Daemons, backend: Backend) -> None:
    """It is taken for what its status says, and what comes after it is delivered as before."""
    odd: dict[str, tuple[int, bytes, dict[str, str]]] = {
        "cookie": (200, b"", {"Set-Cookie": "\xff=\xfe"}),
        "large": (200, b"x" * 200_000, {}),
        "elsewhere": (302, b"", {"Location": "http://xn--.com/"}),
    }
    fine = (200, b"", {})
    backend.answer = lambda asked: odd.pop(asked.json["data"]["content"], fine)
    daemon = daemons(webhooks__url=backend.url, **ALL)
    async with login(daemon, 7, {"1": None}) as client:
        await send(client, *odd, "fine")
        sent = 'chatd_webhooks_sent_total{event="message.created"}'
        await until(lambda: metric(daemon, sent) == 4)
    contents = [asked.json["data"]["content"] for asked in backend.asked]
    assert sorted(contents) == ["cookie", "elsewhere", "elsewhere", "fine", "large"]
    assert not any("cookie" in asked.headers for asked in backend.asked)
    assert daemon.exit_code is None


class Table:
    """Stands in for the store's: what failed is due again when it says so."""

    def __init__(self, count: int = 0) -> None:
        self.rows: list[Waiting] = []
        self.untried = 0
        self._ids = itertools.count()
        self._due: dict[int, float] = {}
        self._out: dict[int, Waiting] = {}
        self.add(*[b"{}"] * count)

    def add(self, *bodies: bytes) -> None:
        self.rows += [Waiting(next(self._ids), "message.created", body, 0) for body in bodies]

    async def claim(self, most: int, lease: float, *, again: bool) -> list[Waiting]:
        return self._take(self._ready(again)[:most])

    async def claim_some(self, lease: float, *, again: bool) -> list[Waiting]:
        ready = self._ready(again)
        return self._take(ready[:1] + ready[1:][-1:])

    def _ready(self, again: bool) -> list[Waiting]:
        now = trio.current_time()
        return [one for one in self.rows if bool(one.attempts) is again and self._due.get(one.id, 0) <= now]

    def _take(self, taken: list[Waiting]) -> list[Waiting]:
        self.rows = [one for one in self.rows if one not in taken]
        self._out |= {one.id: one for one in taken}
        return taken

    async def settle(self, done: list[int], failed: list[Failed], untried: list[int]) -> None:
        self.untried += len(untried)
        for id in done:
            del self._out[id]
        self.rows += [self._out.pop(id) for id in untried]
        for one in failed:
            before = self._out.pop(one.id)
            if one.again_in is not None:
                self._due[one.id] = trio.current_time() + one.again_in
                self.rows.append(Waiting(before.id, before.event, before.body, before.attempts + 1))

    async def counts(self) -> tuple[int, int]:
        return len(self.rows) + len(self._out), 0


@asynccontextmanager
async def delivering(table: Table, fetch: Any, **settings: Any) -> AsyncIterator[WebhookDelivery]:
    webhooks = WebhookDelivery(
        Webhooks(url="http://127.0.0.1/", secret=SECRET, **settings),
        table,  # type: ignore[arg-type]
        fetch,
    )
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(webhooks.run, stop)
        yield webhooks
        stop.set()
        await webhooks.finished.wait()


async def test_a_backend_that_is_away_for_hours_is_asked_seldom(
    autojump_clock: trio.testing.MockClock,
) -> None:
    table, calls, away = Table(100), 0, True

    async def fetch(*_: Any, **__: Any) -> Answer:
        nonlocal calls
        calls += 1
        if away:
            raise CallFailed("timeout", "nobody is there")
        return Answer(200, b"")

    async with delivering(table, fetch, kept=50, attempts=10**6) as webhooks:
        await trio.sleep(0.1)
        assert calls <= AT_ONCE + FAILURES
        assert table.untried >= CLAIM - calls, "they keep their attempts"
        assert webhooks.full
        await trio.sleep(5 * 3600)
        lanes, some = 2, 2
        assert calls < 2.5 * lanes * some * 5 * 3600 / REST_MOST
        away = False
        await trio.sleep(RETRY_MOST * 1.25 + REST_MOST + COUNT)
        assert table.rows == []
        assert not webhooks.full


async def test_one_event_that_fails_delays_no_other(autojump_clock: trio.testing.MockClock) -> None:
    """However often it has failed while there was nothing else: what is new goes out at once."""
    table, taken = Table(), []

    async def fetch(*_: Any, content: bytes, **__: Any) -> Answer:
        taken.append(trio.current_time())
        return Answer(500 if content == b"bad" else 200, b"")

    async with delivering(table, fetch) as webhooks:
        for _ in range(2 * FAILURES):
            table.add(b"bad")
            webhooks.wake()
            await trio.sleep(2 * REST_MOST)
            table.rows.clear()
        await trio.sleep(REST_MOST)
        table.add(b"good")
        began = trio.current_time()
        webhooks.wake()
        await trio.sleep(1)
        assert taken[-1] == began


@pytest.mark.parametrize("status", [500, 404, 503, 0])
async def test_thirty_events_that_fail_hold_up_no_good_one(
    autojump_clock: trio.testing.MockClock, status: int
) -> None:
    """Neither those behind them nor those that come while they are tried again."""
    table, taken = Table(), {}

    async def fetch(*_: Any, content: bytes, within: float, **__: Any) -> Answer:
        if content == b"bad" and not status:
            await trio.sleep(within)
            raise CallFailed("timeout", "it does not answer")
        if content != b"bad":
            taken[content] = trio.current_time()
        return Answer(status if content == b"bad" else 200, b"")

    table.add(*[b"bad"] * 30, *(b"good %d" % number for number in range(50)))
    patience = 3.0 if status else 30.0  # calls that are not answered take their time
    async with delivering(table, fetch) as webhooks:
        await trio.sleep(patience)
        assert len(taken) == 50
        for number in range(50, 150):
            table.add(b"good %d" % number)
            began = trio.current_time()
            webhooks.wake()
            await trio.sleep(2)
            assert taken[b"good %d" % number] - began < 0.1


async def test_what_is_new_reaches_a_backend_that_refuses_all_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It answers, so it is not down: new events are tried also while hundreds of others are refused."""
    table, taken, calls = Table(), [], 0

    async def fetch(*_: Any, content: bytes, **__: Any) -> Answer:
        nonlocal calls
        calls += 1
        if content == b"good":
            taken.append(trio.current_time())
        return Answer(500 if content == b"bad" else 200, b"")

    table.add(*[b"bad"] * 500)
    async with delivering(table, fetch) as webhooks:
        await trio.sleep(10)
        assert calls < 60, "and yet it is left in peace"
        began = trio.current_time()
        table.add(b"good")
        webhooks.wake()
        await trio.sleep(5)
        assert taken[0] - began < 1.5


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
            table = store.webhooks
            first = await table.claim(3, lease=0.5, again=False)
            rest = await table.claim(10, lease=0.5, again=False)
            assert [int(one.body) for one in first + rest] == [0, 1, 2, 3, 4]
            assert await table.claim(10, lease=1, again=False) == []
            await table.settle([one.id for one in first], [])
            await trio.sleep(0.6)  # those that were not settled are due again
            left = await table.claim(10, lease=60, again=False)
            assert [int(one.body) for one in left] == [3, 4]
            assert await table.counts() == (2, 0)
            failed = Failed(left[0].id, "HTTP 500", again_in=0)
            await table.settle([], [failed], untried=[left[1].id])
            await writer.submit([Notify(event="user.online", body=b"5")]).outcomes()
            assert [int(one.body) for one in await table.claim_some(lease=0, again=False)] == [4, 5]
            new = await table.claim(10, lease=60, again=False)
            assert [(int(one.body), one.attempts) for one in new] == [(4, 0), (5, 0)]
            old = await table.claim_some(lease=0, again=True)
            assert old == await table.claim(10, lease=60, again=True)
            assert [(int(one.body), one.attempts) for one in old] == [(3, 1)]
            await table.settle([new[1].id], [Failed(old[0].id, "HTTP 410", again_in=None)])
            assert await table.claim(10, lease=60, again=True) == []
            assert await table.counts() == (1, 1)
            long_ago = update(schema.webhooks).values(due_at="2020-01-01T00:00:00.000000Z")
            with store._writing.begin() as connection:
                connection.execute(long_ago)
            assert await store.webhooks.counts() == (1, 0), "what was given up long ago has gone"
            nursery.cancel_scope.cancel()

    trio.run(main)
    store.close()


async def test_a_claim_whose_answer_was_lost_delays_nothing(database_url: str) -> None:
    store = open_store(Database(url=database_url))
    writer = store.writer(node=None, on_commit=lambda group: None)
    table = store.webhooks
    real = table._in_thread

    async def committed_but_not_answered(*arguments: Any) -> Any:
        await real(*arguments)
        raise Unavailable

    async with trio.open_nursery() as nursery:
        await nursery.start(writer.run)
        await writer.submit([Notify(event="user.online", body=b"1")]).outcomes()
        table._in_thread = committed_but_not_answered  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(Unavailable):
                await table.claim(10, lease=60, again=False)
        table._in_thread = real  # type: ignore[method-assign]
        (found,) = await table.claim(10, lease=60, again=False)
        assert found.body == b"1"
        assert await table.claim(10, lease=60, again=False) == []
        nursery.cancel_scope.cancel()
    store.close()


async def test_what_became_of_events_is_noted_when_the_database_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    table, away = Table(), True
    settle = table.settle

    async def sometimes(*arguments: Any) -> None:
        if away:
            raise Unavailable
        await settle(*arguments)

    async def fetch(*_: Any, **__: Any) -> Answer:
        return Answer(200, b"")

    table.settle = sometimes  # type: ignore[method-assign]
    table.add(b"1")
    async with delivering(table, fetch):
        await trio.sleep(10)
        assert table._out
        away = False
        await trio.sleep(LOOK + 0.1)
        assert not table._out


# The hook.


def unchecked(wanted: Any) -> None:
    """No limits are of interest here."""


def hook(fetch: Fetcher, backend: Backend, **more: Any) -> BeforeMessage:
    return BeforeMessage(Webhooks(secret=SECRET, before_message_url=backend.url, **more), fetch, unchecked)


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
    backend.answer = lambda request: (200, {"action": "refuse", "message": None})
    with pytest.raises(Forbidden, match="refused"):
        await before.check(asked)
    await fetch.close()


@pytest.mark.parametrize("failure", ["refuse", "accept"])
async def test_a_hook_that_fails_is_left_alone_for_a_while(
    autojump_clock: trio.testing.MockClock, failure: Literal["refuse", "accept"]
) -> None:
    asked, calls, hangs = Create(conversation_id=1, user_id=7, content="x"), 0, True

    async def fetch(*_: Any, within: float, **__: Any) -> Answer:
        nonlocal calls
        calls += 1
        if hangs:
            await trio.sleep(within)
            raise CallFailed("timeout", "nobody is there")
        return Answer(200, b'{"action":"accept"}')

    settings = Webhooks(secret=SECRET, before_message_url="http://127.0.0.1/", before_message_failure=failure)
    before = BeforeMessage(settings, fetch, unchecked)  # type: ignore[arg-type]

    async def check() -> bool:
        try:
            return await before.check(asked) is asked
        except Unavailable:
            return False

    for _ in range(MOST):
        assert await check() is (failure == "accept")
    began = trio.current_time()
    for _ in range(100):
        assert await check() is (failure == "accept")
    assert (calls, trio.current_time() - began) == (MOST, 0), "nobody waits for it"
    hangs = False
    await trio.sleep(REST)
    assert await check()
    assert await check()
    assert calls == MOST + 2


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


WRONG = {
    "content": [{"content": ""}, {"content": "x" * 8001}, {"content": "\0"}, {"content": 5}],
    "meta": [{"meta": {"a": "x" * 9000}}],
    "type": [{"type": ""}, {"type": "x" * 33}],
}


@pytest.mark.parametrize("failure", ["refuse", "accept"])
async def test_a_verdict_that_cannot_be_used_is_final_for_the_client_and_told_to_the_operator(
    daemons: Daemons, backend: Backend, failure: str
) -> None:
    daemon = daemons(
        webhooks__before_message_url=backend.url,
        webhooks__secret=SECRET,
        webhooks__before_message_failure=failure,
    )
    async with login(daemon, 7, {"1": None}) as client:
        for field, verdicts in WRONG.items():
            for verdict in verdicts:
                backend.answer = lambda asked, verdict=verdict: (200, {"action": "change"} | verdict)  # type: ignore[misc]
                refused = await client.request("send", conversation_id=1, content="x")
                assert (refused["code"], refused["retryable"]) == ("internal", False), verdict
                assert "hook" not in refused["message"], "where the backend is, and what, is not for clients"
            lines = [json.loads(one) for one in daemon.log.splitlines() if '"hook_verdict_unusable"' in one]
            (line,) = [one for one in lines if one["field"] == field]
            assert line["incident"] == refused["incident"], "one cause, one incident"
            assert line["advice"]
        half = b'{"action": "change", "content": "an emoji cut in two: \\ud83d"}'
        backend.answer = lambda asked: (200, half)
        assert (await client.request("send", conversation_id=1, content="x"))["retryable"] is False
        metrics = daemon.get("/metrics").body.decode()
        assert 'chatd_hook_failures_total{reason="unusable_verdict"} 8.0' in metrics
        assert 'chatd_backend_answers{call="before_message"} 1.0' in metrics
        assert daemon.get("/api/ws/conversations/1/messages").json["messages"] == []


async def test_null_in_a_verdict_means_that_nothing_is_changed(backend: Backend) -> None:
    asked = Create(conversation_id=1, user_id=7, content="x", type="image")
    fetch = Fetcher(["127.0.0.0/8"])
    backend.answer = lambda request: (200, {"action": "change", "content": None, "type": None})
    changed = await hook(fetch, backend).check(asked)
    assert (changed.content, changed.type) == ("x", "image")
    await fetch.close()


async def test_a_client_meets_the_hook(daemons: Daemons, backend: Backend) -> None:
    def judge(asked: Asked) -> tuple[int, Any]:
        content = asked.json["data"]["content"]
        if content == "spam":
            return 200, {"action": "refuse", "message": "no spam"}
        return 200, {"action": "change", "content": content.upper()}

    backend.answer = judge
    daemon = daemons(webhooks__before_message_url=backend.url, webhooks__secret=SECRET)
    async with login(daemon, 7, {"1": None}) as client:
        for _ in range(2):  # the retry is one, whatever the hook makes of it
            (ok,) = await send(client, "hello")
        assert (ok["event"], ok["seq"], ok["duplicate"]) == ("ok", 1, True)
        (refused,) = await send(client, "spam")
        assert (refused["code"], refused["message"]) == ("forbidden", "no spam")
        for number in range(5):  # in order, though each waits for the backend
            await client.send("send", conversation_id=1, content=f"n{number}", ref=number + 500)
        (first, *rest) = await client.messages(6)
        assert [one["content"] for one in (first, *rest)] == ["HELLO", "N0", "N1", "N2", "N3", "N4"]
        asked = len(backend.asked)
        daemon.post(1, 8, "the backend's own")
        await client.messages(1)
        assert len(backend.asked) == asked


async def test_the_hook_judges_edits_too(daemons: Daemons, backend: Backend) -> None:
    def judge(asked: Asked) -> tuple[int, Any]:
        data = asked.json["data"]
        if data.get("content") == "spam":
            return 200, {"action": "refuse", "message": "no spam"}
        if "message_id" in data and data.get("content") == "darn":
            return 200, {"action": "change", "content": "d**n", "meta": {"clean": True}, "type": "other"}
        return 200, {"action": "accept"}

    backend.answer = judge
    daemon = daemons(webhooks__before_message_url=backend.url, webhooks__secret=SECRET)
    async with login(daemon, 7, {"1": None}) as client:
        sent = await client.request("send", conversation_id=1, content="fine", client_id="k")
        await client.messages(1)
        refused = await client.request("edit", conversation_id=1, id=sent["id"], content="spam")
        assert (refused["code"], refused["message"]) == ("forbidden", "no spam")
        assert daemon.get("/api/ws/conversations/1/messages").json["messages"][0]["content"] == "fine"
        assert signed(backend.asked[-1])
        assert backend.asked[-1].json["event"] == "before_message"
        assert backend.asked[-1].json["data"] == {
            "conversation_id": 1, "user_id": 7, "message_id": sent["id"], "content": "spam",
        }  # fmt: skip
        assert (await client.request("edit", conversation_id=1, id=sent["id"], meta={"a": 1}))["event"] == "ok"
        assert backend.asked[-1].json["data"]["meta"] == {"a": 1}
        assert "content" not in backend.asked[-1].json["data"]
        await client.expect("message.updated")
        asked = len(backend.asked)
        await client.request("react", conversation_id=1, id=sent["id"], emoji="spam", on=True)
        await client.expect("message.updated")
        assert len(backend.asked) == asked, "reactions are bounded, not judged"
        for number in (1, 2):  # a retried edit is one more edit, and is asked for again
            asked = len(backend.asked)
            edited = await client.request("edit", conversation_id=1, id=sent["id"], content="darn")
            assert edited["event"] == "ok"
            assert len(backend.asked) == asked + 1, number
            told = await client.expect("message.updated")
            assert (told["content"], told["meta"], told["type"]) == ("d**n", {"clean": True}, "text")


@pytest.fixture
def judged(daemons: Daemons, backend: Backend) -> Daemon:
    """A daemon whose rooms are for members, and whose hook accepts all."""
    backend.answer = lambda request: (200, {"action": "accept"})
    url = {"webhooks__before_message_url": backend.url, "webhooks__secret": SECRET}
    return daemons(rooms__access="members", **url)


def member(daemon: Daemon, user: int, conversation: int = 1, **more: Any) -> None:
    answer = daemon.request("PUT", f"/api/ws/conversations/{conversation}/members/{user}", more)
    assert answer.status == 200


async def test_the_hook_is_not_asked_about_what_is_refused_anyway(judged: Daemon, backend: Backend) -> None:
    member(judged, 7)
    place = {"conversation_id": 1, "content": "x"}
    own, others, deleted = (judged.post(1, user, "x")["id"] for user in (7, 8, 7))
    judged.request("DELETE", f"/api/ws/messages/{deleted}")
    elsewhere = judged.post(2, 8, "x")["id"]
    async with login(judged, 7) as client:
        for id, code in ((others, "forbidden"), (deleted, "not_found"), (10**6, "not_found")):
            refused = await client.request("edit", id=id, **place)
            assert (refused["code"], refused["field"]) == (code, "id")
        assert (await client.request("edit", id=elsewhere, **place))["code"] == "not_found"
        for conversation in (2, 3):  # not a member; there is none
            for command in ({"event": "send"}, {"event": "edit", "id": elsewhere}):
                refused = await client.request(**command, conversation_id=conversation, content="x")
                assert refused["code"] == "not_found"
        member(judged, 7, muted_until="2999-01-01T00:00:00Z")
        assert (await client.request("edit", id=own, **place))["code"] == "muted"
        assert backend.asked == []
        member(judged, 7, muted_until=None, role="moderator")
        for id in (own, others):
            assert (await client.request("edit", id=id, **place))["event"] == "ok"
        assert len(backend.asked) == 2


async def test_what_was_accepted_is_decided_once_more_when_it_is_stored(
    judged: Daemon, backend: Backend
) -> None:
    member(judged, 7)
    id = judged.post(1, 7, "x")["id"]

    def delete(asked: Asked) -> tuple[int, Any]:
        judged.request("DELETE", f"/api/ws/messages/{id}")
        return 200, {"action": "accept"}

    backend.answer = delete
    async with login(judged, 7) as client:
        refused = await client.request("edit", conversation_id=1, id=id, content="y")
        assert (refused["code"], len(backend.asked)) == ("not_found", 1)


async def test_a_retry_of_one_who_is_muted_meanwhile_is_a_retry(judged: Daemon) -> None:
    member(judged, 7)
    async with login(judged, 7) as client:
        (sent,) = await send(client, "hello")
        member(judged, 7, muted_until="2999-01-01T00:00:00Z")
        (again,) = await send(client, "hello")
        assert (again["event"], again["id"], again["duplicate"]) == ("ok", sent["id"], True)
        (refused,) = await send(client, "more")
        assert refused["code"] == "muted"


async def test_sends_and_edits_keep_their_order_while_the_hook_is_asked(
    daemons: Daemons, backend: Backend
) -> None:
    def judge(asked: Asked) -> tuple[int, Any]:
        time.sleep(0.1 if "message_id" in asked.json["data"] else 0)  # edits take longer than sends
        return 200, {"action": "accept"}

    backend.answer = judge
    daemon = daemons(webhooks__before_message_url=backend.url, webhooks__secret=SECRET)
    async with login(daemon, 7, {"1": None}) as client:
        sent = await client.request("send", conversation_id=1, content="first", client_id="k")
        for number in range(3):
            await client.send("edit", conversation_id=1, id=sent["id"], content=f"e{number}")
            await client.send("send", conversation_id=1, content=f"n{number}")
        seen = await client.messages(7)
        assert [one["content"] for one in seen] == ["first", "e0", "n0", "e1", "n1", "e2", "n2"]


async def test_what_users_and_members_do_is_told_when_asked_for(daemons: Daemons, backend: Backend) -> None:
    wanted = "message.updated,message.deleted,message.reacted,member.added,member.removed"
    daemon = daemons(webhooks__url=backend.url, webhooks__secret=SECRET, webhooks__events=wanted)
    daemon.request("PUT", "/api/ws/conversations/1/members/8", {"role": "moderator"})
    async with login(daemon, 7, {"1": None}) as client, login(daemon, 8, {"1": None}) as moderator:
        sent = await client.request("send", conversation_id=1, content="a")
        id, place = sent["id"], {"conversation_id": 1}
        await client.request("edit", **place, id=id, content="b")
        await client.request("react", **place, id=id, emoji="👍", on=True)
        await client.request("react", **place, id=id, emoji="👍", on=True)  # it was so already
        await moderator.request("delete", **place, id=id)
        refused = await moderator.request("delete", **place, id=id)
        assert refused["code"] == "not_found"
    daemon.request("DELETE", "/api/ws/conversations/1/members/8")
    daemon.post(1, 9, "becomes a member by this")
    await until(lambda: len(backend.asked) >= 6)
    assert all(signed(one) for one in backend.asked)
    told = {(one.json["event"], one.json["data"].get("user_id")): one.json["data"] for one in backend.asked}
    assert len(told) == len(backend.asked) == 6
    edited, reacted = told["message.updated", 7], told["message.reacted", 7]
    assert (edited["id"], edited["content"], edited["seq"], edited["by"]) == (id, "b", 2, 7)
    assert (reacted["emoji"], reacted["on"], reacted["seq"], reacted["by"]) == ("👍", True, 3, 7)
    assert reacted["reactions"] == {"👍": [7]}
    deleted = told["message.deleted", 7]
    assert (deleted["content"], deleted["seq"], deleted["by"]) == (None, 4, 8)
    assert deleted["deleted_at"]
    assert told["member.added", 8]["role"] == "moderator"
    assert told["member.removed", 8]["state"] == "removed"
    assert told["member.removed", 8]["version"] > told["member.added", 8]["version"]
    assert told["member.added", 9]["state"] == "active"


def test_who_does_not_ask_is_told_what_was_told_before() -> None:
    events = ["message.created", "user.online", "user.offline", "room.occupied", "room.vacated"]
    assert Webhooks().events == events


async def test_why_the_hook_fails_is_for_the_operator_alone(daemons: Daemons, backend: Backend) -> None:
    daemon = daemons(webhooks__before_message_url=backend.url, webhooks__secret=SECRET)
    backend.answer = lambda asked: (500, {})
    async with login(daemon, 7, {"1": None}) as client:
        for _ in range(3):
            refused = await client.request("send", conversation_id=1, content="x")
            assert (refused["code"], refused["message"]) == ("unavailable", "the backend does not answer")
        lines = [line for line in daemon.log.splitlines() if '"hook_failed"' in line]
        assert len(lines) == 1, "a line for the cause, not for each message"
        assert "answered 500" in lines[0]
        metrics = daemon.get("/metrics").body.decode()
        assert 'chatd_hook_failures_total{reason="wrong_answer"} 3.0' in metrics
        assert 'chatd_backend_answers{call="before_message"} 0.0' in metrics
        backend.answer = lambda asked: (200, {"action": "accept"})
        assert (await client.request("send", conversation_id=1, content="x"))["event"] == "ok"
        assert 'chatd_backend_answers{call="before_message"} 1.0' in daemon.get("/metrics").body.decode()
