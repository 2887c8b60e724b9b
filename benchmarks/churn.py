"""Clients that come, stay a while, and go, for as long as one likes: what chatd's memory does meanwhile."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click
import trio
from msgspec import Struct

from benchmarks.audience import SOURCES, Failure
from benchmarks.daemons import SECRET, Pinned, pin, pinned, tell
from benchmarks.subjects import allow_descriptors
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN
from tests.faults.line import Closed, Line
from tests.faults.workload import Backend

ROOM_SIZE = 10
POSTS = 20  # a second, to any of the rooms
HTTP_STAY = 2.0  # seconds that an HTTP connection stays after its answer, on average
USERS = 100_000  # that clients are drawn from: tables by user grow to this, and no further
STORED = 100_000  # messages, posted before: SQLite fills its page caches, 24 MiB in all, in any case
BATCH = 500  # of them
STEADY = 5  # of the minutes, before which everything is still being filled


class Minute(Struct):
    """At its end: `memory` in bytes, `blocks` that Python holds, joins and HTTP connections so far."""

    memory: int
    blocks: float
    requests: int
    joins: int
    connections: float
    cpu: float


class Churn:
    def __init__(self, node: Pinned, rate: int, stay: float, http: int) -> None:
        self._node, self._rate, self._stay, self._http = node, rate, stay, http
        self._tokens = Tokens(SECRET)
        self._rooms = round(rate * stay / ROOM_SIZE)
        self.joins = self.requests = 0

    async def run(self, minutes: int) -> list[Minute]:
        await self._fill()
        found: list[Minute] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._come, nursery)
            nursery.start_soon(self._post)
            nursery.start_soon(self._ask, nursery)
            for number in range(1, minutes + 1):
                cpu = self._node.cpu()
                await trio.sleep(60)
                memory = self._node.memory()
                there = await self._metric('chatd_connections{state="ready"}')
                blocks = await self._metric("chatd_memory_blocks")
                cpu = (self._node.cpu() - cpu) / 60
                found.append(Minute(memory, blocks, self.requests, self.joins, there, cpu))
                tell(f"minute {number} of {minutes}: {memory / 1e6:.0f} MB, {self.joins:,} joins")
            nursery.cancel_scope.cancel()
        return found

    async def _metric(self, name: str) -> float:
        return await trio.to_thread.run_sync(self._node.metric, name)

    async def _fill(self) -> None:
        backend = Backend(TOKEN)
        for posted in range(0, STORED, BATCH):
            tell(f"filling the database: {posted:,} of {STORED:,} messages")
            messages = [
                {"conversation_id": random.randint(1, self._rooms), "sender_id": 1, "content": "x" * 60}
                for _ in range(BATCH)
            ]
            path = "/api/ws/messages/batch"
            status, _ = await backend.request(self._node.api_port, "POST", path, {"messages": messages})
            if status != 200:
                raise Failure(f"a batch was answered with {status}")
        backend.close()

    async def _come(self, nursery: trio.Nursery) -> None:
        began = trio.current_time()
        for number in range(10**9):
            await trio.sleep_until(began + number / self._rate)
            nursery.start_soon(self._visit)

    async def _visit(self) -> None:
        """Half of them say goodbye, half are just gone."""
        user = random.randrange(1, USERS)
        room = str(user % self._rooms + 1)
        with suppress(Closed, OSError):
            line = await Line.open(self._node.hub_port, f"127.0.0.{2 + user % SOURCES}")
            try:
                await line.send("auth", ref=1, token=self._tokens.issue(user, 3600), rooms={room: None})
                self.joins += 1
                with trio.move_on_after(random.expovariate(1 / self._stay)):
                    while True:
                        await line.texts()
                if user % 2:
                    await line.close_well()
            finally:
                line.close()

    async def _ask(self, nursery: trio.Nursery) -> None:
        """Connections that bring one request and stay a while, like those of a backend without a pool."""
        began = trio.current_time()
        for number in range(10**9 if self._http else 0):
            await trio.sleep_until(began + number / self._http)
            nursery.start_soon(self._request, number)

    async def _request(self, number: int) -> None:
        room = number % self._rooms + 1
        text = f'{{"conversation_id":{room},"sender_id":1,"content":"{"x" * 60}"}}'
        line, body = (
            ("POST /api/ws/messages", text),
            (f"GET /api/ws/conversations/{room}/messages?limit=5", ""),
            ("POST /api/ws/tokens", '{"user_id":5}'),
            ("GET /readyz", ""),
            ("GET /nowhere", ""),
            ("POST /api/ws/messages", "no JSON"),
            ("no HTTP", ""),
        )[number % 7]
        head = f"{line} HTTP/1.1\r\nHost: x\r\nX-Internal-Token: {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        stream = await trio.open_tcp_stream("127.0.0.1", self._node.api_port)
        async with stream:
            await stream.send_all((head + body).encode())
            if not await stream.receive_some(65536):
                raise Failure(f"{line} was not answered")
            self.requests += 1
            await trio.sleep(random.expovariate(1 / HTTP_STAY))

    async def _post(self) -> None:
        backend = Backend(TOKEN)
        while True:
            await trio.sleep(1 / POSTS)
            body = {"conversation_id": random.randint(1, self._rooms), "sender_id": 1, "content": "x" * 60}
            status, _ = await backend.request(self._node.api_port, "POST", "/api/ws/messages", body)
            if status != 200:
                raise Failure(f"a post was answered with {status}")


@click.command("churn")
@click.option("--minutes", type=click.IntRange(1), default=60, show_default=True)
@click.option("--rate", default=200, show_default=True, help="Joins a second.")
@click.option("--stay", default=10.0, show_default=True, help="Seconds that a client stays, on average.")
@click.option("--http", default=50, show_default=True, help="HTTP connections a second, each for one request.")
def command(minutes: int, rate: int, stay: float, http: int) -> None:
    """Clients and HTTP connections come and go for an hour: memory, minute by minute."""
    allow_descriptors(round(3 * rate * stay + 5 * http * HTTP_STAY) + 500)
    cores = pin()
    click.echo(f"churn: {rate} joins a second, each for {stay:.0f} s on average, {POSTS} posts a second,")
    click.echo(f"{http} HTTP connections a second, each for one request and {HTTP_STAY:.0f} s on average")
    click.echo(f"{STORED:,} messages are stored before the first minute; {pinned(cores)}\n")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
        node = Pinned(
            Path(directory), cores[0], limits__handshakes_per_second=0, limits__connections_per_user=0
        )
        try:
            node.start()
            found = trio.run(Churn(node, rate, stay, http).run, minutes)
        except* Failure as group:
            raise click.ClickException(f"this run does not count: {group.exceptions[0]}.") from None
        finally:
            node.close()
    tell("")
    _report(found, time.monotonic() - began)


def _report(found: Sequence[Minute], seconds: float) -> None:
    click.echo(f"{'minute':>8}{'joins':>12}{'there':>8}{'HTTP':>10}{'memory, MB':>12}{'blocks':>12}{'CPU':>7}")
    for number, one in enumerate(found, 1):
        memory = f"{one.memory / 1e6:.1f}"
        click.echo(
            f"{number:>8}{one.joins:>12,}{one.connections:>8.0f}{one.requests:>10,}{memory:>12}{one.blocks:>12,.0f}{one.cpu:>7.0%}"
        )
    if len(found) > 2 * STEADY:
        steady = [one.memory / 1e6 for one in found[STEADY:]]
        half = len(steady) // 2
        first, second = sum(steady[:half]) / half, sum(steady[half:]) / len(steady[half:])
        click.echo(
            f"\nAfter minute {STEADY}, on average: {first:.1f} MB in the first half, then {second:.1f} MB."
        )
