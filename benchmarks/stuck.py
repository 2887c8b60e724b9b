"""Clients that never read, in a room where much is said: what they cost, and what the others notice of them.

Two daemons are measured in one run, by turns: one with the stuck clients and one without.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import monotonic

import click
import msgspec
import trio
from msgspec import Struct

from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, milliseconds, percentile, pin, pinned, tell
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN
from tests.faults.line import Closed, Line
from tests.faults.workload import Backend

ROOM = 1
BATCHES = 50  # a second
MESSAGE_BYTES = 1000  # of content
RECEIVE_BUFFER = 4096  # bytes the kernel keeps for a client that does not read
END = 3.0  # seconds for the last messages to arrive
_REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Meta(Struct):
    at: float


class Message(Struct):
    """What a reader looks at."""

    event: str
    seq: int = 0
    meta: Meta | None = None


_decode = msgspec.json.Decoder(Message).decode


class Round(Struct):
    """Seconds: `lags` from a post's moment to a reader, `cut` from the first post to each stuck one's end."""

    lags: list[float]
    cut: list[float]
    peak: int
    cpu: float


class Room:
    def __init__(self, node: Pinned, readers: int, stuck: int, rate: int, seconds: float) -> None:
        self._node, self._readers, self._stuck = node, readers, stuck
        self._rate, self._seconds = rate, seconds
        self._tokens = Tokens(SECRET)
        self._lags: list[float] = []
        self._heads: list[int] = []
        self._expected = 0

    async def run(self) -> Round:
        with ExitStack() as stack:
            for user in range(1, self._stuck + 1):
                stack.callback((await trio.to_thread.run_sync(self._deaf, user)).close)
            async with trio.open_nursery() as nursery:
                for number in range(self._readers):
                    await nursery.start(self._read, number)
                self._node.forget_peak()
                before = self._node.cpu()
                cut: list[float] = []
                nursery.start_soon(self._count_cut, cut)
                await self._post()
                await trio.sleep(END)
                if min(self._heads) < self._expected:
                    raise Failure(f"a reader has {min(self._heads)} of {self._expected} messages")
                nursery.cancel_scope.cancel()
            await trio.sleep(1.0)
            return Round(self._lags, cut, self._node.memory("VmHWM"), self._node.cpu() - before)

    def _deaf(self, user: int) -> socket.socket:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        deaf.connect(("127.0.0.1", self._node.hub_port))
        token = self._tokens.issue(user, 3600)
        text = json.dumps({"event": "auth", "token": token, "rooms": {str(ROOM): None}}).encode()
        deaf.sendall(_REQUEST)
        _read_until(deaf, b'"hello"')
        deaf.sendall(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)
        _read_until(deaf, b'"ready"')  # and never again
        return deaf

    async def _read(self, number: int, *, task_status: trio.TaskStatus[None]) -> None:
        line = await Line.open(self._node.hub_port, "127.0.0.1")
        token = self._tokens.issue(100_000 + number, 3600)
        await line.send("auth", ref=1, token=token, rooms={str(ROOM): None})
        head = 0
        while True:
            texts = await line.texts()
            now = monotonic()
            for text in texts:
                message = _decode(text)
                if message.event == "ready":
                    head = msgspec.json.decode(text)["rooms"][str(ROOM)]["seq"]
                    self._heads.append(head)
                    task_status.started()
                elif message.event == "message":
                    if message.seq != head + 1 or message.meta is None:
                        raise Failure(f"a reader was given seq {message.seq} after {head}")
                    head = self._heads[number] = message.seq
                    self._lags.append(now - message.meta.at)
                elif message.event == "ping":
                    await line.send("pong")

    async def _post(self) -> None:
        start, backend = monotonic(), Backend(TOKEN)
        size = self._rate // BATCHES
        self._expected = self._heads[0] + size * round(self._seconds * BATCHES)
        for number in range(round(self._seconds * BATCHES)):
            due = start + number / BATCHES
            await trio.sleep(max(0.0, due - monotonic()))
            one = {"conversation_id": ROOM, "sender_id": 9, "content": "x" * MESSAGE_BYTES, "meta": {"at": due}}
            body = {"messages": [one] * size}
            status, _ = await backend.request(self._node.api_port, "POST", "/api/ws/messages/batch", body)
            if status != 200:
                raise Failure(f"a batch was answered with {status}")

    async def _count_cut(self, cut: list[float]) -> None:
        start, backend = monotonic(), Backend(TOKEN)
        while len(cut) < self._stuck:
            page = await backend.text(self._node.api_port, "/metrics")
            now = int(float(page.partition('\nchatd_connections{state="ready"} ')[2].partition("\n")[0]))
            gone = self._stuck + self._readers - now
            cut += [monotonic() - start] * (gone - len(cut))
            await trio.sleep(0.1)


def _read_until(peer: socket.socket, wanted: bytes) -> None:
    got = b""
    while wanted not in got:
        got += peer.recv(RECEIVE_BUFFER)


@click.command("stuck")
@click.option("--stuck", default=200, show_default=True, help="Clients that never read.")
@click.option("--readers", default=30, show_default=True, help="Clients that do, in the same room.")
@click.option("--rate", default=1000, show_default=True, help="Messages of 1 kB a second.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def command(stuck: int, readers: int, rate: int, seconds: float, rounds: int) -> None:
    """Clients that never read: the memory they cost, and the others' delay beside a run without them."""
    cores = pin()
    click.echo(
        f"stuck: {readers} readers in one room, {rate:,} messages of 1 kB a second for {seconds:.0f} s,"
        f" {rounds} rounds by turns with and without {stuck} clients that never read"
    )
    click.echo(f"{pinned(cores)}\n")
    found: dict[int, list[Round]] = {0: [], stuck: []}
    with ExitStack() as stack:
        nodes = {}
        for count in found:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-")))
            nodes[count] = Pinned(directory, cores[0])
            stack.callback(nodes[count].close)
            nodes[count].start()
        try:
            for number in range(rounds):
                for count, node in nodes.items():
                    tell(f"round {number + 1} with {count} stuck …")
                    found[count].append(trio.run(Room(node, readers, count, rate, seconds).run))
        except* (Failure, Closed) as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise click.ClickException(f"this run does not count: {error}.") from None
    tell("")
    click.echo("\n".join(_report(found)))


def _report(found: dict[int, list[Round]]) -> Iterator[str]:
    yield f"{'':22}{'delay of the readers, ms':>30}{'peak memory, MB':>18}{'CPU, s':>9}{'cut off, s':>16}"
    yield f"{'':22}{'p50':>10}{'p99':>10}{'max':>10}{'':>27}{'first – last':>16}"
    for count, rounds in found.items():
        middle = [median(percentile(one.lags, share) for one in rounds) for share in (0.5, 0.99, 1.0)]
        columns = "".join(f"{milliseconds(value):>10}" for value in middle)
        peak = max(one.peak for one in rounds) / 2**20
        cut = [moment for one in rounds for moment in one.cut]
        span = f"{min(cut):.1f} – {max(cut):.1f}" if cut else "–"
        name = f"with {count} stuck" if count else "without"
        yield f"{name:22}{columns}{peak:>18.0f}{median(one.cpu for one in rounds):>9.1f}{span:>16}"
    yield ""
    yield f"p99 with them over p99 without, median of the pairs: {_ratio(found):.2f}"
    total = sum(len(one.lags) for rounds in found.values() for one in rounds)
    yield f"Received: {total:,} messages, by every reader each once and in order."


def _ratio(found: dict[int, list[Round]]) -> float:
    plain, burdened = found.values()
    pairs = zip(plain, burdened, strict=True)
    return median(percentile(b.lags, 0.99) / percentile(p.lags, 0.99) for p, b in pairs)
