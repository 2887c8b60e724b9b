"""All clients are cut at once: how long until they are back, with what they missed, and what that costs.

The daemon is killed and started again on the same database. Every client comes back as the protocol says, after
a random and growing wait, with its cursor.
"""

from __future__ import annotations

import gc
import random
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import click
import trio
from msgspec import Struct

from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, percentile, pin, pinned, tell
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN
from tests.faults.line import Closed, Frame, Line
from tests.faults.workload import Backend
from tests.services import PostgresServer

ROOM_SIZE = 10
# Of docs/protocol.md §6: random(0, min(most, first · 2^n)), on top of what a refusal asks for.
BACKOFF_FIRST, BACKOFF_MOST = 0.5, 20.0  # seconds
COMING = 100  # clients that connect at once, in the beginning
PATIENCE = 240.0  # seconds until a run is given up
BATCH = 1000  # messages in one request
SOURCES = 8  # addresses that the clients connect from, so that there are ports for all
DESCRIPTORS = 200  # beside the sockets


class Client:
    """One user in one room, with a cursor. `back` is when its second `ready` came."""

    def __init__(self, port: int, number: int, tokens: Tokens) -> None:
        self._port, self._source = port, f"127.0.0.{2 + number % SOURCES}"
        self._room = str(number // ROOM_SIZE + 1)
        self._token = tokens.issue(number + 1, 24 * 3600)
        self._cursor: int | None = None
        self.heard: list[int] = []
        self.there = trio.Event()
        self.back: float | None = None
        self.tries = 0

    async def run(self, coming: trio.CapacityLimiter) -> None:
        async with coming:
            line = await self._log_in()
        self.there.set()
        while True:
            with suppress(Closed):
                await self._listen(line)
            line.close()
            line = await self._come_back()
            self.back = monotonic()

    async def _come_back(self) -> Line:
        asked = 0.0  # seconds that the server asked for
        while True:
            await trio.sleep(asked + random.uniform(0, min(BACKOFF_MOST, BACKOFF_FIRST * 2**self.tries)))
            self.tries += 1
            try:
                return await self._log_in()
            except Closed as refusal:
                asked = refusal.retry_after
            except OSError:
                asked = 0.0  # nobody listens yet

    async def _log_in(self) -> Line:
        line = await Line.open(self._port, self._source)
        try:
            await line.send("auth", ref=1, token=self._token, rooms={self._room: self._cursor})
            ready = False
            while not ready:
                for frame in await line.receive():
                    ready |= self._take(frame)
        except BaseException:
            line.close()
            raise
        return line

    async def _listen(self, line: Line) -> None:
        while True:
            for frame in await line.receive():
                self._take(frame)
                if frame.event == "ping":
                    await line.send("pong")

    def _take(self, frame: Frame) -> bool:
        """True for `ready`."""
        if frame.event == "message":
            self.heard.append(frame.seq)
            self._cursor = frame.seq
        elif frame.event == "ready":
            answer = frame.rooms[self._room]
            self.heard += [change.seq for change in answer.changes]
            self._cursor = answer.seq
        return frame.event == "ready"


class Storm(Struct):
    """What it took. Times are seconds from the cut; CPU and statements are those of the new daemon's logins."""

    listening: float
    back: list[float]
    cpu: float
    statements: float
    tries: int
    memory: int


async def storm(node: Pinned, clients: int, limit: int) -> Storm:
    tokens = Tokens(SECRET)
    crowd = [Client(node.hub_port, number, tokens) for number in range(clients)]
    rooms = range(1, -(-clients // ROOM_SIZE) + 1)
    async with trio.open_nursery() as nursery:
        await _post(node, rooms, "before")
        coming = trio.CapacityLimiter(COMING)
        for client in crowd:
            nursery.start_soon(client.run, coming)
        for number, client in enumerate(crowd):
            await client.there.wait()
            if number % 500 == 0:
                tell(f"{number:,} clients are there")
        gc.collect()
        gc.freeze()  # ten thousand clients are no garbage
        node.environ["CHATD_LIMITS__HANDSHAKES_PER_SECOND"] = str(limit)
        cut = monotonic()
        await trio.to_thread.run_sync(node.kill)
        await trio.to_thread.run_sync(node.start)
        listening, cpu, statements = monotonic(), node.cpu(), node.metric("chatd_statements_total")
        await _post(node, rooms, "while they were away")
        while missing := sum(client.back is None for client in crowd):
            tell(f"{monotonic() - cut:.0f} s: {clients - missing:,} are back")
            if monotonic() - cut > PATIENCE:
                raise Failure(f"{missing:,} clients were not back after {PATIENCE:.0f} s")
            await trio.sleep(0.25)
        cpu, statements = node.cpu() - cpu, node.metric("chatd_statements_total") - statements
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    if wrong := sum(client.heard != [2] for client in crowd):
        raise Failure(f"{wrong:,} clients were not given exactly the one message that they missed")
    back = [client.back - cut for client in crowd if client.back is not None]
    tries = sum(client.tries for client in crowd)
    return Storm(listening - cut, back, cpu, statements, tries, node.memory())


async def _post(node: Pinned, rooms: Sequence[int], content: str) -> None:
    """One message to each room."""
    backend = Backend(TOKEN)
    for start in range(0, len(rooms), BATCH):
        messages = [
            {"conversation_id": room, "sender_id": 999_999, "content": content}
            for room in rooms[start : start + BATCH]
        ]
        body = {"messages": messages}
        status, _ = await backend.request(node.api_port, "POST", "/api/ws/messages/batch", body)
        if status != 200:
            raise Failure(f"a batch was answered with {status}")


@click.command("storm")
@click.option("--clients", default=10_000, show_default=True)
@click.option("--limit", "limits", type=int, multiple=True, help="Handshakes a second; 500 and 0, none.")
@click.option("--database", type=click.Choice(["sqlite", "postgresql"]), default="sqlite", show_default=True)
def command(clients: int, limits: tuple[int, ...], database: str) -> None:
    """All clients are cut at once, and come back with their cursors: time, CPU, queries."""
    _allow_descriptors(clients)
    cores = pin()
    click.echo(f"storm: {clients:,} clients in rooms of {ROOM_SIZE}, cut by SIGKILL, {database}")
    click.echo(pinned(cores))
    click.echo(
        f"Each tries after random(0, min({BACKOFF_MOST:.0f} s, {BACKOFF_FIRST} s · 2^n)),"
        " and after what a 503 asks for on top.\n"
    )
    found: dict[int, Storm] = {}
    try:
        for limit in limits or (500, 0):
            with ExitStack() as stack:
                node = _node(stack, cores[0], database)
                found[limit] = trio.run(storm, node, clients, limit)
    except* Failure as group:
        raise click.ClickException(f"this run does not count: {group.exceptions[0]}.") from None
    tell("")
    click.echo("\n".join(_report(found, clients)))


def _node(stack: ExitStack, core: int, database: str) -> Pinned:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-")))
    settings: dict[str, Any] = {"limits__handshakes_per_second": 0}
    if database == "postgresql":
        settings["database__url"] = stack.enter_context(PostgresServer(directory / "postgres", fsync=True)).url
    (directory / "node").mkdir()
    node = Pinned(directory / "node", core, **settings)
    stack.callback(node.close)
    if database == "postgresql":
        node.command("migrate")
    node.start()
    return node


def _allow_descriptors(clients: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = clients + DESCRIPTORS
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise click.ClickException(f"{needed} open files are needed and {hard} allowed (ulimit -Hn).")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


def _report(found: dict[int, Storm], clients: int) -> Iterator[str]:
    yield f"{'handshakes a second':20}{'back after, s, from the cut':>36}{'listening':>11}{'each client':>30}"
    yield (
        f"{'':20}{'50 %':>9}{'90 %':>9}{'99 %':>9}{'all':>9}{'s':>11}{'tries':>8}{'CPU, ms':>10}{'queries':>12}"
        f"{'memory, MB':>14}"
    )
    for limit, one in found.items():
        times = "".join(f"{percentile(one.back, share):>9.1f}" for share in (0.5, 0.9, 0.99, 1.0))
        name = f"at most {limit}" if limit else "no limit"
        yield (
            f"{name:20}{times}{one.listening:>11.1f}{one.tries / clients:>8.1f}"
            f"{one.cpu / clients * 1000:>10.2f}{one.statements / clients:>12.1f}{one.memory / 2**20:>14.0f}"
        )
    yield ""
    yield f"Each of the {clients:,} clients was given exactly the one message that it had missed."
