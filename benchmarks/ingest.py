"""E: how many messages chatd takes, each acknowledged after a durable commit, on each of its four ways in."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from itertools import count as numbers
from typing import Any

import msgspec
import redis
import trio
from msgspec import Struct

from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, tell
from benchmarks.results import Results
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN
from tests.faults.line import Line
from tests.faults.workload import Backend

RATE, CPU = "messages per second", "CPU per message"
CONTENT = "x" * 100
WARM_UP = 1.0  # seconds
POSTERS, BATCHERS, SENDERS = 16, 4, 300  # connections; a sender keeps below its limit of requests
BATCH = 500  # messages in a request
COMING = 0.002  # seconds between two of them that connect: those who are there send as fast as they can
PIPELINED = 4  # sends of a connection that wait for their answers
ENTRIES = 200  # XADDs in a pipeline
BACKLOG = 20_000  # entries that may wait in chat.ingest: it is full all the time, and no longer than that

Way = Callable[[Pinned, "Tally", int], Awaitable[None]]


class Tally(Struct):
    """Messages that were acknowledged."""

    done: int = 0


def measure(results: Results, node: Pinned, redis_url: str, *, seconds: float, rounds: int) -> None:
    ways: dict[str, tuple[Way, int]] = {
        "POST, one message": (_post, POSTERS),
        f"POST, batches of {BATCH}": (_post_batches, BATCHERS),
        "WebSocket send": (_send, SENDERS),
    }
    if redis_url:
        ways["XADD chat.ingest"] = (_Feed(redis_url).run, 1)
    for number in range(rounds):
        for name, (way, workers) in ways.items():
            tell(f"taking messages in, round {number + 1} of {rounds}: {name}")
            rate, cpu = trio.run(_measure, node, way, workers, seconds)
            results.add("E", RATE, name, "/s", rate)
            results.add("E", CPU, name, "µs", cpu * 1e6)


async def _measure(node: Pinned, way: Way, workers: int, seconds: float) -> tuple[float, float]:
    """(messages a second, CPU seconds of chatd for one)"""
    tally = Tally()
    async with trio.open_nursery() as nursery:
        for number in range(workers):
            nursery.start_soon(way, node, tally, number)
        await trio.sleep(WARM_UP)
        done, cpu, began = tally.done, node.cpu(), time.monotonic()
        await trio.sleep(seconds)
        done, cpu, elapsed = tally.done - done, node.cpu() - cpu, time.monotonic() - began
        nursery.cancel_scope.cancel()
    if not done:
        raise Failure("nothing was taken")
    return done / elapsed, cpu / done


def _message(place: int, key: Any) -> dict[str, Any]:
    return {"conversation_id": place, "sender_id": 1, "content": CONTENT, "client_id": str(key)}


async def _post(node: Pinned, tally: Tally, number: int) -> None:
    backend = Backend(TOKEN)
    for n in numbers():
        key = f"{time.monotonic_ns()}-{number}-{n}"
        body = _message(1 + number, key)
        status, answer = await backend.request(node.api_port, "POST", "/api/ws/messages", body)
        if status != 200:
            raise Failure(f"a post was answered with {status}: {answer}")
        tally.done += 1


async def _post_batches(node: Pinned, tally: Tally, number: int) -> None:
    backend = Backend(TOKEN)
    while True:
        began = time.monotonic_ns()
        body = {"messages": [_message(1 + n % 10, f"{began}-{number}-{n}") for n in range(BATCH)]}
        status, answer = await backend.request(node.api_port, "POST", "/api/ws/messages/batch", body)
        if status != 200 or not all("id" in result for result in answer["results"]):
            raise Failure(f"a batch was answered with {status}")
        tally.done += BATCH


async def _send(node: Pinned, tally: Tally, number: int) -> None:
    await trio.sleep(number * COMING)
    line = await Line.open(node.hub_port, f"127.0.0.{2 + number % 8}")
    await line.send("auth", ref=0, token=Tokens(SECRET).issue(number + 1, 3600), rooms={})
    while not any(frame.event == "ready" for frame in await line.receive()):
        pass
    began, waiting = time.monotonic_ns(), 0
    for ref in numbers(1):
        await line.send(
            "send", ref=ref, conversation_id=1 + number, content=CONTENT, client_id=f"{began}-{ref}"
        )
        waiting += 1
        while waiting >= PIPELINED:
            for frame in await line.receive():
                if frame.event == "error":
                    raise Failure(f"a send was refused: {frame.code}")
                waiting -= frame.event == "ok"
                tally.done += frame.event == "ok"


class _Feed:
    """XADDs in pipelines. What is gone from the stream was committed and acknowledged."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)

    async def run(self, node: Pinned, tally: Tally, number: int) -> None:
        added = 0
        while True:
            left = await trio.to_thread.run_sync(self._feed, added, time.monotonic_ns())
            added += ENTRIES if left is not None else 0
            waiting = left if left is not None else await trio.to_thread.run_sync(self._waiting)
            tally.done = added - waiting

    def _feed(self, added: int, began: int) -> int | None:
        """Add some, if there is room; how many wait then."""
        if self._waiting() > BACKLOG:
            time.sleep(0.005)
            return None
        with self._client.pipeline(transaction=False) as pipeline:
            for n in range(ENTRIES):
                message = msgspec.json.encode(_message(1 + (added + n) % 10, f"{began}-{n}"))
                pipeline.xadd("chat.ingest", {"m": message})
            pipeline.execute()
        return self._waiting()

    def _waiting(self) -> int:
        return int(self._client.xlen("chat.ingest"))
