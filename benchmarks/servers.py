"""The servers that are measured, each in a process of its own: chatd's hub, and plain trio-websocket.

They take commands as lines of JSON on stdin and answer each with a line on stdout. They end with their
stdin, and when no command comes for a while.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio
from msgspec import Struct
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from benchmarks.daemons import SECRET
from chatd import config
from chatd.config.settings import Settings
from chatd.core.model import Change, Group, Kind, Message
from chatd.core.protocol import change_payload
from chatd.daemon import assembly, garbage, lifecycle
from chatd.daemon.listen import open_socket
from chatd.hub.fanout.subscription import Subscription
from chatd.net.descriptors import client_slots, raise_descriptor_limit
from chatd.observe import logs
from chatd.store.database import Store, open_store

ROOM = 1
IDLE_SECONDS = 900  # without a command: whoever gave them is gone or stuck


class Prepare(Struct, tag=True):
    """Build `count` messages of `size` bytes, the first with the seq `first`."""

    first: int
    count: int
    size: int


class Go(Struct, tag=True):
    """Send what was prepared, one of the server's ways, with `pause` seconds from message to message."""

    way: str
    pause: float = 0.0


Command = Prepare | Go
Way = Callable[[Sequence[Change], float], Awaitable[None]]


def messages(first: int, count: int, size: int) -> list[Change]:
    """Messages as the store hands them to the bus, each an event of exactly `size` bytes."""
    return [
        Change(ROOM, seq, Kind.CREATED, _payload(seq, size), previous=None)
        for seq in range(first, first + count)
    ]


def _payload(seq: int, size: int) -> bytes:
    message = Message(ROOM, seq, 1, "text", "", None, "2026-01-01T00:00:00.000000Z", seq, None)
    missing = size - len(change_payload(Kind.CREATED, seq, message))
    return change_payload(Kind.CREATED, seq, msgspec.structs.replace(message, content="x" * missing))


class ChatdServer:
    """The hub and the fanout as `daemon.run` puts them together; the bus brings messages as if committed."""

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {"push": self._one_by_one, "joined": self._together}
        self._heard = trio.Event()

    # A listener: stands last in the room and says when a message has gone to everybody.

    user_id = 0
    flat = False

    def push(self, frames: bytes) -> None:
        self._heard.set()

    def try_push(self, frames: bytes) -> bool:
        self._heard.set()
        return True

    def offer(self, frames: bytes) -> bool:
        self._heard.set()
        return True

    def resync(self, subscription: Subscription) -> None:
        raise AssertionError("a message was lost on the way to the fanout")

    def fall_behind(self, subscription: Subscription) -> None:
        raise AssertionError("there is room for everything")

    def dropped(self, subscription: Subscription) -> None:
        raise AssertionError("the last of the room was dropped")

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
            settings = _settings(Path(directory))
            store = open_store(settings.database)
            try:
                await self._serve(settings, store, task_status)
            finally:
                store.close()

    async def _serve(self, settings: config.Config, store: Store, status: trio.TaskStatus[int]) -> None:
        listening = open_socket("hub.bind", settings.hub.bind)
        parts = assembly.assemble(Settings(settings), store, "benchmark")
        self._bus = parts.bus
        self._rooms = parts.services.rooms
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.writer.run)
            await nursery.start(parts.bus.run, parts.receiver)
            # No sweep: what is published here is in no database, which would have another history then.
            await nursery.start(parts.services.fanout.run)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
            await nursery.start(parts.hub.serve, [listener], client_slots(raise_descriptor_limit()))
            status.started(listening.getsockname()[1])

    async def _one_by_one(self, changes: Sequence[Change], pause: float) -> None:
        start = trio.current_time()
        with self._last_in_room(changes[0].seq - 1) as last:
            for number, change in enumerate(changes):
                if pause:
                    await trio.sleep_until(start + number * pause)
                await self._publish([change], last)

    async def _together(self, changes: Sequence[Change], pause: float) -> None:
        with self._last_in_room(changes[0].seq - 1) as last:
            await self._publish(list(changes), last)

    @contextmanager
    def _last_in_room(self, head: int) -> Iterator[Subscription]:
        last = self._rooms.join(ROOM, self, entitled=True)
        last.settle(head)
        try:
            yield last
        finally:
            self._rooms.leave(last)

    async def _publish(self, changes: list[Change], last: Subscription) -> None:
        self._bus.publish(Group(changes, [], None))
        while last.cursor < changes[-1].seq:
            self._heard = trio.Event()
            await self._heard.wait()


class PlainServer:
    """What one writes first with trio-websocket: a set of connections, and a loop that sends to each."""

    def __init__(self) -> None:
        self.ways: dict[str, Way] = {"send_message": self._send_message, "write": self._write}
        self._connections: dict[WebSocketConnection, int] = {}  # and their descriptors

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, self._serve_one, 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            task_status.started(listener.socket.getsockname()[1])

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream)
            connection = await request.accept()
            self._connections[connection] = stream.socket.fileno()
            try:
                while True:
                    await connection.get_message()
            except ConnectionClosed:
                del self._connections[connection]

    async def _send_message(self, changes: Sequence[Change], pause: float) -> None:
        for change in changes:
            text = change.payload.decode()
            for connection in list(self._connections):
                await connection.send_message(text)

    async def _write(self, changes: Sequence[Change], pause: float) -> None:
        """The kernel's part alone: the least that a system call for each delivery can cost."""
        for change in changes:
            frame = b"\x81\x7e%b%b" % (len(change.payload).to_bytes(2, "big"), change.payload)
            for descriptor in self._connections.values():
                assert os.write(descriptor, frame) == len(frame)
            await trio.lowlevel.checkpoint()


SERVERS: dict[str, type[ChatdServer | PlainServer]] = {"chatd": ChatdServer, "plain": PlainServer}


def _settings(directory: Path) -> config.Config:
    """As configured by default, but for what a thousand silent clients at once run into."""
    environ = {
        "HUB__BIND": "127.0.0.1:0",
        "HUB__PING_INTERVAL": "3600",  # the clients do not answer
        "DATABASE__URL": f"sqlite:///{directory}/chatd.db",
        "AUTH__SECRET": SECRET,
        "ROOMS__ACCESS": "open",
        "LIMITS__HANDSHAKES_PER_SECOND": "0",
        "LOGS__LEVEL": "warning",
    }
    settings = config.load(
        environ={f"CHATD_{key}": value for key, value in environ.items()}, require_token=False
    )
    logs.configure(settings.logs.level, settings.logs.format)
    return settings


async def _run(server: ChatdServer | PlainServer) -> None:
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(server.run)
        await nursery.start(garbage.collect, lambda: 0)  # as `daemon.run` does at this point, for both
        _answer(port)
        await _obey(server.ways)
        nursery.cancel_scope.cancel()


async def _obey(ways: dict[str, Way]) -> None:
    prepared: list[Change] = []
    decoder = msgspec.json.Decoder(Command)
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as commands:
        while line := await commands.receive_some():  # a short line each, and the next after its answer
            signal.alarm(IDLE_SECONDS)
            match decoder.decode(line):
                case Prepare(first, count, size):
                    prepared = messages(first, count, size)
                case Go(way, pause):
                    await ways[way](prepared, pause)
            _answer(True)


def _answer(value: int) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def main(name: str, core: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the commands
    signal.alarm(IDLE_SECONDS)
    warnings.simplefilter("default")
    os.sched_setaffinity(0, {int(core)})
    sys.setswitchinterval(lifecycle.SWITCH_INTERVAL)
    trio.run(partial(_run, SERVERS[name]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
