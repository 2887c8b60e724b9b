"""Redis stops answering for a while: what that does to who posts, and to who listens on the same node.

Posts come at a steady rate and are timed from the moment they were due: a stall is not hidden by waiting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from time import monotonic
from typing import Any

import click
import redis
import trio
from msgspec import Struct

from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, milliseconds, percentile, pin, pinned, tell
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN
from tests.faults.line import Line
from tests.faults.workload import Backend
from tests.services import PostgresServer, RedisServer

PARTS = ("before", "stopped", "after")
CONNECTIONS = 16  # that the posts are spread over
ROOM = 1
CATCH_UP = 30.0  # seconds that Redis has to be given everything


class Post(Struct):
    """Seconds from the moment it was due; None where it did not happen."""

    part: str
    answered: float | None = None
    delivered: float | None = None
    id: int = 0


class Outage:
    def __init__(self, node: Pinned, server: RedisServer, rate: int, seconds: float) -> None:
        self._node, self._server = node, server
        self._rate, self._seconds = rate, seconds
        self.posts: list[Post] = []
        self._due: list[float] = []
        self.ready: list[str] = []

    async def run(self) -> None:
        count = round(self._rate * self._seconds)
        self.posts = [Post(part) for part in PARTS for _ in range(count)]
        start = monotonic() + 0.5
        self._due = [start + number / self._rate for number in range(len(self.posts))]
        send, receive = trio.open_memory_channel[int](len(self.posts))
        line = await Line.open(self._node.hub_port, "127.0.0.1")
        token = Tokens(SECRET).issue(1, 3600)
        await line.send("auth", ref=1, token=token, rooms={str(ROOM): None})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, line)
            nursery.start_soon(self._break_redis, start)
            async with trio.open_nursery() as posting:
                for _ in range(CONNECTIONS):
                    posting.start_soon(self._post, receive.clone())
                receive.close()
                with send:
                    for number, due in enumerate(self._due):
                        await trio.sleep(max(0.0, due - monotonic()))
                        send.send_nowait(number)
            await trio.sleep(1.0)
            nursery.cancel_scope.cancel()
        line.close()

    async def _post(self, numbers: trio.MemoryReceiveChannel[int]) -> None:
        backend = Backend(TOKEN)
        async for number in numbers:
            body = {"conversation_id": ROOM, "sender_id": 9, "content": str(number)}
            try:
                status, answer = await backend.request(self._node.api_port, "POST", "/api/ws/messages", body)
            except (OSError, trio.TooSlowError):
                continue
            if status == 200:
                self.posts[number].answered = monotonic() - self._due[number]
                self.posts[number].id = answer["id"]

    async def _listen(self, line: Line) -> None:
        while True:
            for frame in await line.receive():
                if frame.event == "message":
                    number = int(frame.content or "0")
                    self.posts[number].delivered = monotonic() - self._due[number]
                elif frame.event == "ping":
                    await line.send("pong")

    async def _break_redis(self, start: float) -> None:
        for part, action in zip(PARTS, (None, self._server.pause, self._server.resume), strict=True):
            tell(f"Redis {part} …" if part == "stopped" else f"{part} …")
            if action is not None:
                await trio.to_thread.run_sync(action)
            await trio.sleep(max(0.0, self._seconds - 1.0))
            answer = await trio.to_thread.run_sync(self._node.get, "/readyz")
            self.ready.append(answer.json["status"])
            start += self._seconds
            await trio.sleep(max(0.0, start - monotonic()))

    def check(self) -> int:
        """How many of the acknowledged posts Redis has in the end: all of them. Raises Failure."""
        wanted = {post.id for post in self.posts if post.answered is not None}
        deadline = monotonic() + CATCH_UP
        with closing(redis.Redis.from_url(self._server.url, protocol=2)) as client:
            while monotonic() < deadline:
                entries: Any = client.xrange("chat.stream")
                found = {int(entry[b"m"].partition(b'"id":')[2].partition(b",")[0]) for _, entry in entries}
                if wanted <= found:
                    return len(wanted)
        raise Failure(f"{len(wanted - found)} acknowledged posts never reached Redis")


@click.command("outage")
@click.option("--seconds", default=10.0, show_default=True, help="Before, while Redis is stopped, and after.")
@click.option("--rate", default=200, show_default=True, help="Posts a second.")
@click.option("--database", type=click.Choice(["sqlite", "postgresql"]), default="sqlite", show_default=True)
def command(seconds: float, rate: int, database: str) -> None:
    """Redis is stopped with SIGSTOP: p50 and p99 of posts and deliveries before, meanwhile and after."""
    cores = pin()
    click.echo(f"outage: {rate} posts/s for 3 × {seconds:.0f} s, {database}, Redis stopped in the middle part")
    click.echo(f"{pinned(cores)}; Redis{' and PostgreSQL' if database != 'sqlite' else ''} on either\n")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-")))
        server = stack.enter_context(RedisServer(directory / "redis"))
        settings = {"redis__url": server.url}
        if database == "postgresql":
            settings["database__url"] = stack.enter_context(PostgresServer(directory / "pg", fsync=True)).url
        (directory / "node").mkdir()
        node = Pinned(directory / "node", cores[0], **settings)
        stack.callback(node.close)
        if database == "postgresql":
            node.command("migrate")
        node.start()
        outage = Outage(node, server, rate, seconds)
        try:
            trio.run(outage.run)
            stored = outage.check()
        except Failure as failure:
            raise click.ClickException(f"this run does not count: {failure}.") from failure
    tell("")
    click.echo("\n".join(_report(outage, stored)))


def _report(outage: Outage, stored: int) -> Iterator[str]:
    head = f"{'posts answered':>28}{'delivered on this node':>28}{'unanswered':>12}  /readyz"
    yield f"{'ms from the moment due':24}{head}"
    yield f"{'':24}{'p50':>10}{'p99':>9}{'max':>9}{'p50':>10}{'p99':>9}{'max':>9}"
    for part, ready in zip(PARTS, outage.ready, strict=True):
        posts = [post for post in outage.posts if post.part == part]
        columns = ""
        for values in (
            [post.answered for post in posts if post.answered is not None],
            [post.delivered for post in posts if post.delivered is not None],
        ):
            p50, p99, most = (milliseconds(percentile(values, share)) for share in (0.5, 0.99, 1.0))
            columns += f"{p50:>10}{p99:>9}{most:>9}"
        unanswered = sum(post.answered is None for post in posts)
        yield f"{'Redis ' + part if part == 'stopped' else part:24}{columns}{unanswered:>12}  {ready}"
    yield ""
    yield f"All {stored:,} acknowledged posts were in chat.stream in the end."
