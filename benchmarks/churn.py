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
USERS = 100_000  # that clients are drawn from: tables by user grow to this, and no further
STEADY = 5  # of the minutes, before which everything is still being filled


class Minute(Struct):
    """`memory` in bytes at its end, what it held at most since the start, and joins so far."""

    memory: int
    joins: int
    connections: float
    cpu: float


class Churn:
    def __init__(self, node: Pinned, rate: int, stay: float) -> None:
        self._node, self._rate, self._stay = node, rate, stay
        self._tokens = Tokens(SECRET)
        self._rooms = round(rate * stay / ROOM_SIZE)
        self.joins = 0

    async def run(self, minutes: int) -> list[Minute]:
        found: list[Minute] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._come, nursery)
            nursery.start_soon(self._post)
            for number in range(1, minutes + 1):
                cpu = self._node.cpu()
                await trio.sleep(60)
                memory, there = self._node.memory(), self._node.metric('chatd_connections{state="ready"}')
                found.append(Minute(memory, self.joins, there, (self._node.cpu() - cpu) / 60))
                tell(f"minute {number} of {minutes}: {memory / 1e6:.0f} MB, {self.joins:,} joins")
            nursery.cancel_scope.cancel()
        return found

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
                await line.send("auth", ref=1, token=self._tokens.issue(user, 3600), rooms={room: 0})
                self.joins += 1
                with trio.move_on_after(random.expovariate(1 / self._stay)):
                    while True:
                        await line.texts()
                if user % 2:
                    await line.close_well()
            finally:
                line.close()

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
def command(minutes: int, rate: int, stay: float) -> None:
    """Clients come and go for an hour: memory, minute by minute."""
    allow_descriptors(round(3 * rate * stay) + 500)
    cores = pin()
    click.echo(f"churn: {rate} joins a second, each for {stay:.0f} s on average, {POSTS} posts a second")
    click.echo(f"{pinned(cores)}\n")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
        node = Pinned(
            Path(directory), cores[0], limits__handshakes_per_second=0, limits__connections_per_user=0
        )
        try:
            node.start()
            found = trio.run(Churn(node, rate, stay).run, minutes)
        except* Failure as group:
            raise click.ClickException(f"this run does not count: {group.exceptions[0]}.") from None
        finally:
            node.close()
    tell("")
    _report(found, time.monotonic() - began)


def _report(found: Sequence[Minute], seconds: float) -> None:
    click.echo(f"{'minute':>8}{'joins':>12}{'there':>8}{'memory, MB':>12}{'CPU':>7}")
    for number, one in enumerate(found, 1):
        if number <= STEADY or number % STEADY == 0 or number == len(found):
            memory = f"{one.memory / 1e6:.1f}"
            click.echo(f"{number:>8}{one.joins:>12,}{one.connections:>8.0f}{memory:>12}{one.cpu:>7.0%}")
    if len(found) > 2 * STEADY:
        steady = [one.memory / 1e6 for one in found[STEADY:]]
        half = len(steady) // 2
        first, second = sum(steady[:half]) / half, sum(steady[half:]) / len(steady[half:])
        click.echo(
            f"\nAfter minute {STEADY}, on average: {first:.1f} MB in the first half, then {second:.1f} MB."
        )
