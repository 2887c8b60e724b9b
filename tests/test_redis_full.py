"""A Redis without room, and the bound of the stream in bytes."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from chatd.bus.trimming import Trimming
from tests.conftest import Daemons
from tests.services import RedisServer

PATIENCE = 30.0  # seconds


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def client(own_redis: RedisServer) -> Iterator[Any]:
    with redis.Redis.from_url(own_redis.url, protocol=2) as made:
        yield made


class Listening:
    """Counts the copies of each message on `chat.messages`."""

    def __init__(self, client: Any) -> None:
        self.copies: Counter[int] = Counter()
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)
        self._pubsub.subscribe("chat.messages")
        self._thread = threading.Thread(target=self._run)
        self._ended = threading.Event()
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            if got := self._pubsub.get_message(timeout=0.1):
                self.copies[json.loads(got["data"])["seq"]] += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._pubsub.close()


def test_a_full_redis_gets_nothing_twice(daemons: Daemons, own_redis: RedisServer, client: Any) -> None:
    node = daemons(redis__url=own_redis.url)
    node.post(1, 1, "first")
    until(lambda: client.xlen("chat.stream") == 1)
    listening = Listening(client)
    try:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        refused = client.info("errorstats").get("errorstat_OOM", {}).get("count", 0)
        for number in range(20):
            node.post(1, 1, f"{number}")
        until(lambda: client.info("errorstats").get("errorstat_OOM", {}).get("count", 0) >= refused + 5)
        assert not listening.copies
        calls = client.info("commandstats")
        assert calls["cmdstat_exec"]["calls"] <= 4, "what was refused is not sent again and again"
        client.config_set("maxmemory", 0)
        until(lambda: client.xlen("chat.stream") == 21)
        until(lambda: len(listening.copies) == 20)
        assert set(listening.copies.values()) == {1}
    finally:
        listening.close()
    assert [json.loads(fields[b"m"])["seq"] for _, fields in client.xrange("chat.stream")] == list(range(1, 22))


def test_the_stream_is_bounded_in_bytes(daemons: Daemons, own_redis: RedisServer, client: Any) -> None:
    """Reactions on a long message, which each carry the whole of it."""
    node = daemons(redis__url=own_redis.url, redis__stream_bytes=1024 * 1024)
    for number in range(150):
        node.post(1, 1, "🙂" * 5000)
        if number % 10 == 9:
            assert client.memory_usage("chat.stream", samples=0) < 1.5 * 1024 * 1024

    def settled() -> bool:
        (_, newest), *_ = client.xrevrange("chat.stream", count=1)
        small = client.memory_usage("chat.stream", samples=0) < 1.2 * 1024 * 1024
        return bool(small and json.loads(newest[b"m"])["seq"] == 150)

    until(settled)
    kept = [json.loads(fields[b"m"])["seq"] for _, fields in client.xrange("chat.stream")]
    assert kept == list(range(151 - len(kept), 151)), "the newest"
    assert len(kept) >= 30


def test_a_stream_that_is_too_large_at_a_start_is_cut(
    daemons: Daemons, own_redis: RedisServer, client: Any
) -> None:
    for number in range(100):
        client.xadd("chat.stream", {"m": f"{number} " + "x" * 30_000, "n": "gone"})
    daemons(redis__url=own_redis.url, redis__stream_bytes=1024 * 1024)
    until(lambda: client.memory_usage("chat.stream", samples=0) < 1.2 * 1024 * 1024)
    assert 25 <= client.xlen("chat.stream") <= 40


def test_small_entries_are_kept_as_many_as_fit() -> None:
    trimming = Trimming(64_000)
    cuts = [trimming.add([(f"{n}-0".encode(), {b"m": b"x" * 40})]) for n in range(10_000)]
    assert set(cuts[:640]) == {None}
    last = next(cut for cut in reversed(cuts) if cut)
    assert 10_000 - int(last.split("-")[0]) in range(640, 660)
