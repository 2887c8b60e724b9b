"""What chatd may do in a Redis with an ACL: the documented line is enough, and each missing right is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import trio
from msgspec import structs

from chatd.bus import rights
from chatd.bus.client import SIGNALS, client_of
from chatd.bus.publisher import Publisher
from chatd.bus.redis import RedisBus
from chatd.config import Config, Redis
from chatd.core.errors import OperatorError
from chatd.core.model import Kick, Present
from chatd.ingest.stream import DEAD, STREAM, IngestStream, Refusal
from chatd.ops.checks import data
from chatd.ops.finding import Case, Level
from tests.services import RedisServer
from tests.test_bus import Ear, EmptyOutbox, expect_links, until

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
RIGHTS = rights.documented(Redis()).split()


class Ruled:
    """A Redis that lets the user `chatd` do only what it is told to."""

    def __init__(self, server: RedisServer) -> None:
        self.admin: Any = redis.Redis.from_url(server.url, protocol=2)
        self.config = Redis(url=f"redis://chatd:pw@127.0.0.1:{server.port}/0")

    def allow(self, *rules: str) -> None:
        self.admin.execute_command("ACL", "SETUSER", "chatd", "reset", "on", ">pw", *rules)


@pytest.fixture
def ruled(own_redis: RedisServer) -> Iterator[Ruled]:
    made = Ruled(own_redis)
    yield made
    made.admin.close()


def test_the_documented_line_is_this_one() -> None:
    (line,) = re.findall(r"^ACL SETUSER chatd .*$", DOCS.read_text(), re.MULTILINE)
    assert line.split()[3:] == ["on", ">password", *RIGHTS]


async def test_the_documented_line_is_enough(ruled: Ruled) -> None:
    ruled.allow(*RIGHTS)
    assert rights.missing(ruled.config) == []
    ear, other = Ear(), Ear()
    with structlog.testing.capture_logs() as lines:
        buses = [RedisBus(ruled.config, node=name, outbox=EmptyOutbox()) for name in ("one", "other")]
        async with trio.open_nursery() as nursery:
            for bus, receiver in zip(buses, (ear, other), strict=True):
                await nursery.start(bus.run, receiver)
            for bus in buses:
                await expect_links(bus, True, 60)
            buses[0].tell(Present("one", [(0, 7, 1, 0)], None))
            buses[0].tell(Kick(7, True, 0.0))
            await until(lambda: len(other.signals) == 2, 60)
            change = b'{"event":"message","conversation_id":1,"seq":1}'
            publisher = Publisher("one", EmptyOutbox(), stream_length=10)
            with redis.Redis.from_url(ruled.config.url, protocol=2) as client:
                await trio.to_thread.run_sync(publisher._send, client, [("one", change, 1, None)])
            nursery.cancel_scope.cancel()
    assert not [line for line in lines if line["log_level"] in ("warning", "error")]
    take_in(ruled)


def take_in(ruled: Ruled) -> None:
    ruled.admin.xadd(STREAM, {"m": "{}"})
    reader = IngestStream(ruled.config, "n")
    assert reader.hold()
    (entry,) = reader.read() or ()
    reader.settle([], [Refusal(entry, "bad_request", "No.", None)])
    assert ruled.admin.xlen(DEAD) == 1 and reader.read() == []
    reader.release()
    reader.close()


def test_each_right_that_is_missing_is_told(ruled: Ruled) -> None:
    """By the doctor, in a sentence with the rule that gives it."""
    untried = {*rights._UNTRIED, f"&{rights.PREFIXED}"} - {"+subscribe"}
    for right in RIGHTS:
        ruled.allow(*(rule for rule in RIGHTS if rule != right))
        missing = rights.missing(ruled.config)
        # The pattern that is there for the hint also gives the channels that it takes.
        # Of the names that are listed by default, those of Laravel may be missing.
        expected = [] if right in untried or right[1:].startswith("laravel") else [right]
        assert missing == expected, right
        if missing:
            found = next(iter(data.redis(Case(Config(redis=ruled.config)))))
            assert found.level is Level.PROBLEM
            assert found.advice == f"ACL SETUSER chatd {right}"


def test_messages_that_come_meanwhile_are_no_answers(ruled: Ruled) -> None:
    ruled.allow(*(rule for rule in RIGHTS), "+xtrim")
    config = structs.replace(ruled.config, foreign_channels=["chat.messages", "shop.messages"])
    client = client_of(config)
    connection = client.connection_pool.get_connection()
    try:
        assert rights._try(connection, "+subscribe", "&chat.*", ("SUBSCRIBE", SIGNALS)) is None
        for _ in range(3):
            ruled.admin.publish(SIGNALS, b"busy")
        refused = rights._try(connection, "+subscribe", "&shop.messages", ("SUBSCRIBE", "shop.messages"))
        assert refused == "&shop.messages"
    finally:
        connection.disconnect()
        client.close()


def test_a_user_without_channels_is_told(ruled: Ruled) -> None:
    """As `acl-pubsub-default resetchannels` of Redis 7 makes it."""
    ruled.allow("~*", "+@all")
    (found, *_) = data.redis(Case(Config(redis=ruled.config)))
    assert found.level is Level.PROBLEM and "&chat.*" in found.advice


async def test_what_is_missing_is_logged_at_the_start(ruled: Ruled) -> None:
    ruled.allow("~*", "+@all", "-xtrim")
    bus = RedisBus(ruled.config, node="n", outbox=EmptyOutbox())
    with structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            await nursery.start(bus.run, Ear())
            await until(lambda: [line for line in lines if line["event"] == "redis_rights_missing"], 60)
            await trio.sleep(3)
            nursery.cancel_scope.cancel()
    (told,) = [line for line in lines if line["event"] == "redis_rights_missing"]
    assert told["advice"].startswith("ACL SETUSER chatd &chat.* +xtrim")
    assert not [line for line in lines if line.get("link") == "pubsub" and line["up"]], "it has no subscription"


def test_a_wrong_password_is_no_server_that_is_down(ruled: Ruled) -> None:
    ruled.allow(*RIGHTS)
    config = Redis(url=ruled.config.url.replace(":pw@", ":other@"))
    (found,) = data.redis(Case(Config(redis=config)))
    assert "password" in found.advice and "Start" not in found.advice
    with pytest.raises(OperatorError):
        data.bus_probe.look(config)
