"""What a backend XADDs to `chat.ingest`: stored in that order, once, by whichever node, whatever breaks."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import trio

from chatd.config import Redis
from chatd.ingest import stream
from chatd.store.read import lookups
from chatd.store.write import statements
from chatd.store.write.commands import Fence
from tests.client import login
from tests.daemon import Daemon
from tests.services import RedisServer
from tests.test_store import bench, post

PATIENCE = 90.0  # seconds; a paused reader takes 10 on an idle machine
STREAM, DEAD, LEASE = "chat.ingest", "chat.ingest.dead", "chat.ingest.reader"


class Feed:
    """A backend that has Redis at hand, and a look at the database that nodes share."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self.server, self.database = server, directory / "shared.db"
        self._directory, self._nodes = directory, 0
        self.redis = redis.Redis.from_url(server.url, protocol=2)
        self.daemons: list[Daemon] = []

    def node(self, **settings: Any) -> Daemon:
        directory = self._directory / f"node-{len(self.daemons)}"
        directory.mkdir()
        given = {"database__url": f"sqlite:///{self.database}", "redis__url": self.server.url} | settings
        self.daemons.append(Daemon(directory, **given))
        return self.daemons[-1].start()

    def add(self, content: str, **fields: Any) -> str:
        return self.add_raw(json.dumps({"conversation_id": 1, "sender_id": 5, "content": content} | fields))

    def add_raw(self, payload: str | bytes, name: str = "m") -> str:
        id: bytes = self.redis.xadd(STREAM, {name: payload})
        return id.decode()

    def add_all(self, contents: list[str]) -> None:
        with self.redis.pipeline(transaction=False) as pipeline:
            for content in contents:
                body = {"conversation_id": 1, "sender_id": 5, "content": content}
                pipeline.xadd(STREAM, {"m": json.dumps(body)})
            pipeline.execute()

    def contents(self, conversation: int = 1) -> list[str]:
        """As the log has them."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            rows = connection.execute(
                "SELECT m.content FROM chat_changes c JOIN chat_messages m ON m.id = c.message_id"
                " WHERE c.conversation_id = ? ORDER BY c.seq",
                [conversation],
            ).fetchall()
        return [content for (content,) in rows]

    def dead(self) -> list[dict[str, str]]:
        entries: Any = self.redis.xrange(DEAD)
        return [{k.decode(): v.decode(errors="replace") for k, v in fields.items()} for _, fields in entries]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, [node.log[-2000:] for node in self.daemons]
            time.sleep(0.02)

    def until_empty(self) -> None:
        self.until(lambda: self.redis.xlen(STREAM) == 0)


@pytest.fixture
def feed(own_redis: RedisServer, tmp_path: Path) -> Iterator[Feed]:
    directory = tmp_path / "feed"
    directory.mkdir()
    made = Feed(own_redis, directory)
    yield made
    for node in made.daemons:
        node.close()
    made.redis.close()


async def test_an_entry_is_stored_delivered_and_gone(feed: Feed) -> None:
    node = feed.node()
    async with login(node, 7, {"1": None}) as ada:
        feed.add("Hello", client_id="k", meta={"a": 1})
        (message,) = await ada.messages(1)
        feed.until_empty()
    assert (message["content"], message["user_id"], message["seq"]) == ("Hello", 5, 1)
    assert (message["client_id"], message["meta"]) == ("k", {"a": 1})
    assert feed.redis.xpending(STREAM, "chatd")["pending"] == 0
    assert feed.redis.exists(DEAD) == 0
    assert "chatd_ingested_total 1.0" in node.get("/metrics").body.decode()


def test_entries_keep_their_order_with_two_nodes(feed: Feed) -> None:
    feed.node()
    feed.node()
    wanted = [str(n) for n in range(2000)]
    for start in range(0, 2000, 100):
        feed.add_all(wanted[start : start + 100])
    feed.until_empty()
    assert feed.contents() == wanted


def test_an_entry_that_comes_again_makes_no_second_row(feed: Feed) -> None:
    """A node has committed, and died before it said so: the next one commits it again."""
    id = feed.add("once")
    feed.redis.xgroup_create(STREAM, "chatd", id="0")
    feed.redis.xreadgroup("chatd", "dead-node", {STREAM: ">"})
    feed.node(redis__ingest="false").post(1, 5, "once", client_id=f"ingest:{id}")
    feed.node()
    feed.until_empty()
    assert feed.contents() == ["once"]
    assert feed.redis.exists(DEAD) == 0


def test_the_same_client_id_is_the_same_message(feed: Feed) -> None:
    feed.node()
    feed.add("first", client_id="k")
    feed.add("first", client_id="k")
    feed.add("other", client_id="k")
    feed.until_empty()
    assert feed.contents() == ["first"]
    assert [(entry["code"], entry["field"]) for entry in feed.dead()] == [("conflict", "client_id")]


def test_what_is_refused_lies_with_the_dead_and_harms_no_other(feed: Feed) -> None:
    feed.redis.xgroup_create(STREAM, "chatd", id="0", mkstream=True)
    good = [feed.add("before")]
    wrong = {
        feed.add_raw("no json"): ("bad_request", None),
        feed.add_raw(b"\xff\xfe"): ("bad_request", None),
        feed.add_raw("[1]"): ("bad_request", None),
        feed.add_raw('{"conversation_id":1}'): ("bad_request", "sender_id, content"),
        feed.add("x", conversation_id="one"): ("bad_request", "conversation_id"),
        feed.add("x" * 8001): ("too_large", "content"),
        feed.add_raw("x" * 300_000): ("too_large", "m"),
        feed.add_raw("{}", name="q"): ("bad_request", "m"),
        feed.add("x", reply_to=99): ("bad_request", "reply_to"),
        feed.add("x", meta={"a": "y" * 9000}): ("too_large", "meta"),
    }
    good.append(feed.add("after"))
    node = feed.node()
    feed.until_empty()
    assert feed.contents() == ["before", "after"]
    dead = {entry["id"]: (entry["code"], entry.get("field")) for entry in feed.dead()}
    assert dead == wrong
    assert all(entry["message"] for entry in feed.dead())
    assert feed.dead()[0]["m"] == "no json"
    assert node.log.count("ingest_refused") == 1
    assert "no json" not in node.log


def test_what_a_dead_node_left_pending_comes_first(feed: Feed) -> None:
    feed.redis.xgroup_create(STREAM, "chatd", id="0", mkstream=True)
    feed.add_all([str(n) for n in range(1200)])
    feed.redis.xreadgroup("chatd", "dead-node", {STREAM: ">"}, count=1100)
    feed.node()
    feed.until_empty()
    assert feed.contents() == [str(n) for n in range(1200)]
    consumers: Any = feed.redis.xinfo_consumers(STREAM, "chatd")
    assert b"dead-node" not in [consumer["name"] for consumer in consumers]


def test_a_killed_reader_is_followed_without_a_loss(feed: Feed) -> None:
    first = feed.node()
    feed.until(lambda: feed.redis.exists(LEASE) == 1)
    second = feed.node()
    wanted = [str(n) for n in range(6000)]
    for start in range(0, 6000, 500):
        feed.add_all(wanted[start : start + 500])
        if start == 3000:
            feed.until(lambda: len(feed.contents()) > 1000)
            first.kill()
    feed.until_empty()
    assert feed.contents() == wanted
    assert '"held": true' in second.log


def test_a_database_that_is_away_loses_nothing(feed: Feed) -> None:
    node = feed.node()
    feed.add("before")
    feed.until_empty()
    with closing(sqlite3.connect(feed.database, isolation_level=None)) as somebody, somebody:
        somebody.execute("BEGIN IMMEDIATE")
        feed.add_all(["a", "b", "c"])
        feed.until(lambda: "write_unavailable" in node.log)
        assert feed.redis.xlen(STREAM) == 3
        somebody.execute("ROLLBACK")
    feed.until_empty()
    assert feed.contents() == ["before", "a", "b", "c"]
    assert feed.redis.exists(DEAD) == 0


def test_it_goes_on_after_redis_was_emptied_and_restarted(feed: Feed) -> None:
    feed.node()
    feed.add("one")
    feed.until_empty()
    feed.redis.flushall()
    feed.add("two")
    feed.until_empty()
    feed.server.kill()
    feed.server.start()
    feed.add("three")
    feed.until_empty()
    assert feed.contents() == ["one", "two", "three"]


def test_a_reader_that_stood_still_does_no_harm(feed: Feed) -> None:
    """Its lease goes to another; when it wakes up, what it had read is there already."""
    first = feed.node()
    feed.until(lambda: feed.redis.exists(LEASE) == 1)
    feed.node()
    feed.add_all([str(n) for n in range(500)])
    feed.until_empty()
    first.signal(signal.SIGSTOP)  # in the middle of a read, which Redis answers
    feed.add_all([str(n) for n in range(500, 1000)])
    feed.until_empty()
    first.signal(signal.SIGCONT)
    feed.add_all([str(n) for n in range(1000, 1500)])
    feed.until_empty()
    assert feed.contents() == [str(n) for n in range(1500)]


def test_a_stop_finishes_the_batch_and_gives_the_lease_back(feed: Feed) -> None:
    node = feed.node()
    feed.until(lambda: feed.redis.exists(LEASE) == 1)
    feed.add_all([str(n) for n in range(3000)])
    assert node.stop() == 0
    assert feed.redis.exists(LEASE) == 0
    stored = feed.contents()
    assert stored == [str(n) for n in range(len(stored))]
    assert feed.redis.xlen(STREAM) == 3000 - len(stored)
    feed.node()
    feed.until_empty()
    assert feed.contents() == [str(n) for n in range(3000)]


def test_it_can_be_left_off(feed: Feed) -> None:
    node = feed.node(redis__ingest="false")
    feed.add("not for us")
    node.post(1, 1, "posted")
    time.sleep(0.7)  # longer than a read waits
    assert feed.redis.xinfo_groups(STREAM) == []
    assert feed.contents() == ["posted"]


# A reader that is paused for longer than its lease lasts, and goes on after another has taken over.


class Interrupted(redis.Redis):
    """Something else happens before a certain one of its commands."""

    left = 0
    action: Callable[[], None]

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.action()
        return super().execute_command(*arguments, **options)


def interrupted(reader: stream.IngestStream, url: str, number: int, action: Callable[[], None]) -> None:
    """From now on the reader's client is one to which that happens."""
    reader.close()
    reader._client = client = Interrupted.from_url(url, protocol=2)
    client.left, client.action = number, action


@pytest.mark.parametrize("number", range(1, 12))
def test_what_a_paused_reader_gets_in_the_middle_of_a_takeover_is_not_lost(
    readers: tuple[stream.IngestStream, stream.IngestStream, Any], own_redis: RedisServer, number: int
) -> None:
    """It looks as if it had nothing, and in that moment it is given something."""
    first, second, looking = readers
    assert first.hold()
    looking.xadd(STREAM, {"m": "0"})
    first.settle(first.read() or (), [])
    looking.delete(LEASE)
    late: list[str] = []

    def read_late() -> None:
        late.append(looking.xadd(STREAM, {"m": "1"}).decode())
        looking.xreadgroup("chatd", "first", {STREAM: ">"})

    interrupted(second, own_redis.url, number, read_late)
    assert second.hold()
    read = [entry.id for entry in second.read() or ()]
    pending = [entry["message_id"].decode() for entry in looking.xpending_range(STREAM, "chatd", "-", "+", 9)]
    assert set(late) <= {*read, *pending}


@pytest.mark.parametrize("number", range(1, 8))
def test_a_reader_that_was_followed_in_the_middle_of_a_read_gets_nothing_new(
    readers: tuple[stream.IngestStream, stream.IngestStream, Any], own_redis: RedisServer, number: int
) -> None:
    first, second, looking = readers
    assert first.hold()
    assert first.read() == []
    added: list[str] = []
    read: list[str] = []

    def follow() -> None:
        looking.delete(LEASE)
        assert second.hold()
        read.extend(entry.id for entry in second.read() or ())
        added.append(looking.xadd(STREAM, {"m": "later"}).decode())

    added.append(looking.xadd(STREAM, {"m": "first"}).decode())
    interrupted(first, own_redis.url, number, follow)
    first.read()
    if len(added) == 1:
        follow()
    read += [entry.id for entry in second.read() or ()]
    assert read == added


@pytest.fixture
def readers(own_redis: RedisServer) -> Iterator[tuple[stream.IngestStream, stream.IngestStream, Any]]:
    """Two that read by turns, and a client that looks."""
    first, second = (stream.IngestStream(Redis(url=own_redis.url), name) for name in ("first", "second"))
    looking = redis.Redis.from_url(own_redis.url, protocol=2)
    yield first, second, looking
    for one in (first, second, looking):
        one.close()


def test_nothing_is_read_or_settled_without_the_lease(
    readers: tuple[stream.IngestStream, stream.IngestStream, Any],
) -> None:
    first, second, looking = readers
    assert first.hold()
    looking.xadd(STREAM, {"m": "1"})
    (one,) = first.read() or ()
    looking.delete(LEASE)  # the first was paused until it ended
    assert second.hold()
    looking.xadd(STREAM, {"m": "2"})
    assert first.read() is None
    assert not first.holding
    first.settle([], [stream.Refusal(one, "bad_request", "No.", None)])
    assert (looking.xlen(DEAD), looking.xlen(STREAM)) == (0, 2)
    assert [entry.payload for entry in second.read() or ()] == [b"1"]
    assert [entry.payload for entry in second.read() or ()] == [b"2"]


def test_what_is_refused_is_kept_up_to_a_number_of_bytes(
    readers: tuple[stream.IngestStream, stream.IngestStream, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "DEAD_KEPT", 1024 * 1024)
    reader, _, looking = readers
    assert reader.hold()
    for number in range(40):
        looking.xadd(STREAM, {"m": f"{number} " + "x" * 200_000})
        refused = [stream.Refusal(entry, "bad_request", "No.", "m") for entry in reader.read() or ()]
        reader.settle([], refused)
    assert looking.memory_usage(DEAD, samples=0) < 1024 * 1024
    kept = [fields[b"m"].split()[0] for _, fields in looking.xrange(DEAD)]
    assert len(kept) >= 2
    assert kept == [str(number).encode() for number in range(40 - len(kept), 40)], "the newest, in order"
    assert looking.xlen(STREAM) == 0


def test_many_small_ones_that_are_refused_do_not_hold_redis_up(
    readers: tuple[stream.IngestStream, stream.IngestStream, Any],
) -> None:
    """Redis walks over all that is kept to say how large it is: not for each entry."""
    reader, _, looking = readers
    assert reader.hold()
    for _ in range(500):
        looking.xadd(STREAM, {"m": "no json"})
    entries = reader.read() or ()
    assert len(entries) == 500
    before = looking.info("commandstats").get("cmdstat_memory|usage", {"calls": 0})["calls"]
    reader.settle([], [stream.Refusal(entry, "bad_request", "No.", "m") for entry in entries])
    asked = looking.info("commandstats")["cmdstat_memory|usage"]["calls"] - before
    assert (looking.xlen(DEAD), looking.xlen(STREAM), asked) == (500, 0, 1)


async def test_a_commit_of_a_reader_that_was_followed_is_refused(database_url: str) -> None:
    async with bench(database_url) as b:
        assert await b.do(post("before"), Fence(token="a"))
        (mine, ordinary) = await b.do(post("of a", client_id="k", fence="a"), post("of nobody"))
        assert (mine.seq, ordinary.seq) == (2, 3)
        await b.do(Fence(token="b"))
        late = await b.do(
            post("late", fence="a"), post("in time", fence="b"), post("of a", client_id="k", fence="a")
        )
        assert [late[0], late[2]] == ["superseded", "superseded"]
        assert late[1].seq == 4
        page = await b.store.read(lookups.history, 1, None, None, 9)
        assert [one.content for one in page.messages] == ["before", "of a", "of nobody", "in time"]


async def test_a_new_reader_waits_for_a_commit_in_progress(postgres_url: str) -> None:
    """So nothing of the old one is committed once the new one has begun."""
    async with bench(postgres_url) as b:
        await b.do(Fence(token="a"))
        with b.store._writing.connect() as other:
            assert other.scalar(statements.FENCE) == "a"
            began = b.writer.submit([Fence(token="b")])
            with trio.fail_after(10):
                while not b.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await trio.sleep(0.01)
        await began.outcome()


def test_a_reader_paused_past_its_lease_keeps_the_order(feed: Feed, postgres_url: str) -> None:
    """Stopped in mid-stream, followed by the other, and going on: each message once, in the order of XADD.

    On PostgreSQL, for a process that stands still in the middle of a commit holds SQLite's lock.
    """
    nodes = [feed.node(database__url=postgres_url) for _ in range(2)]
    added = 0
    for _ in range(2):
        feed.until(lambda: feed.redis.exists(LEASE) == 1)
        reader = next(one for one in nodes if one.log.count('"held": true') > one.log.count('"held": false'))
        stopping = random.randrange(2, 15)
        for count in range(20):
            feed.add_all([str(number) for number in range(added, added + 100)])
            added += 100
            if count == stopping:
                reader.signal(signal.SIGSTOP)
        feed.until_empty()
        feed.add_all([str(number) for number in range(added, added + 500)])
        reader.signal(signal.SIGCONT)
        added += 500
        feed.until_empty()
    with psycopg.connect(postgres_url) as connection:
        query = (
            "SELECT m.content FROM chat_changes c JOIN chat_messages m ON m.id = c.message_id ORDER BY c.seq"
        )
        stored = [content for (content,) in connection.execute(query)]
    assert stored == [str(number) for number in range(added)]
    assert feed.redis.exists(DEAD) == 0
