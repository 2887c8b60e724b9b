"""Hostile peers against a real daemon: each loses its connection in time, and nobody else notices.

Raw sockets, for no library sends what is sent here. Deadlines are those of an impatient configuration.
"""

from __future__ import annotations

import http.client
import json
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection

from tests.client import Client, login
from tests.daemon import TOKEN, Daemon

HANDSHAKE, AUTH, PING, PONG = 0.7, 0.8, 1.0, 1.0  # seconds: the daemon's patience
GOODBYE = 2.0  # seconds it waits for the answer to its close frame
SLACK = 3.0  # seconds of ours on top of every deadline, for a busy machine
PROMPTLY = 1.0  # seconds, where the daemon has nothing to wait for

MEMBER, OFFENDER = 1, 2  # user ids
MANY = 1000  # connections at once

FIN, RESERVED = 0x80, 0x40
CONTINUATION, TEXT, BINARY, CLOSE, PING_OPCODE = 0x0, 0x1, 0x2, 0x8, 0x9
FRAME_LIMIT = 65536
OUTBOX_LIMIT = 1024 * 1024


class Target(Daemon):
    """A daemon whose sockets are counted in its descriptors: /proc/net does not show one that was reset."""

    member = ""  # the token of somebody who does nothing wrong

    @property
    def sockets(self) -> int:
        found = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found += str(descriptor.readlink()).startswith("socket:")
        return found

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """An impatient one. After all that was done to it, it holds no connection and ends in order."""
    with room_for_many_files():
        attacked = Target(
            tmp_path_factory.mktemp("daemon"),
            hub__handshake_timeout=HANDSHAKE,
            hub__auth_timeout=AUTH,
            hub__ping_interval=PING,
            hub__ping_timeout=PONG,
            limits__sends_per_second=0,
            limits__connections_per_user=0,
        )
        try:
            attacked.start()
            attacked.member = attacked.token_for(MEMBER)  # asked for once: tests count connections
            trio.run(until, lambda: not served(attacked.api_port), SLACK)
            at_rest = attacked.sockets
            yield attacked
            trio.run(until, lambda: attacked.sockets <= at_rest, SLACK)
            assert attacked.stop() == 0
        finally:
            attacked.close()


@pytest.fixture(scope="module")
def bearer(daemon: Target) -> bytes:
    return b"Bearer " + daemon.token_for(OFFENDER).encode()


# What is attacked, and who must not notice.


@asynccontextmanager
async def undisturbed(daemon: Target, conversation: int) -> AsyncIterator[None]:
    """Somebody sits in a room during the body; the same connection gets the next message, and at once."""
    before = len(daemon.log)
    send, heard = trio.open_memory_channel[dict[str, Any]](100)
    async with (
        login(daemon, MEMBER, {conversation: None}, token=daemon.member) as bystander,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(listen, bystander, send)
        sockets = daemon.sockets
        yield
        await trio.to_thread.run_sync(daemon.post, conversation, MEMBER, "still here?")
        with trio.fail_after(PROMPTLY):
            message = await heard.receive()
        assert (message["event"], message["content"], message["seq"]) == ("message", "still here?", 1)
        await until(lambda: daemon.sockets <= sockets, SLACK)
        nursery.cancel_scope.cancel()
    assert complaints(daemon.log[before:]) == []


async def listen(client: Client, heard: trio.MemorySendChannel[dict[str, Any]]) -> None:
    while True:
        event = await client.next(patience=2 * (PING + PONG))
        if event["event"] == "ping":
            await client.send("pong")
        elif event["event"] != "member":
            await heard.send(event)


def complaints(log: str) -> list[str]:
    """Lines of a log that are or hold a traceback."""
    return [line for line in log.splitlines() if '"exception"' in line or "Traceback" in line]


class Offender:
    """A raw connection. It may say anything; whether it is heard out does not matter to it."""

    def __init__(self, stream: trio.SocketStream, daemon: Target, others: int) -> None:
        self.stream, self._daemon, self._others = stream, daemon, others
        self._heard = b""

    async def say(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_all(data)

    async def drip(self, data: bytes, pause: float) -> None:
        """One byte at a time. The pauses are the attack."""
        with suppress(trio.BrokenResourceError):
            for byte in data:
                await self.stream.send_all(bytes([byte]))
                await trio.sleep(pause)

    async def hear(self, sign: bytes) -> None:
        with trio.fail_after(PROMPTLY + SLACK):
            while sign not in self._heard:
                assert await self._read(), self._heard

    async def fate(self, within: float) -> Fate:
        """How the daemon ends it: with a goodbye, or without one. It must within so many seconds."""
        started = trio.current_time()
        with trio.move_on_after(within + SLACK):
            while Fate(self._heard).code is None and await self._read():
                pass
            return Fate(self._heard, trio.current_time() - started)
        raise AssertionError(f"not ended after {within} s: {self._heard[-200:]!r}")

    async def _read(self) -> bool:
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            return False
        self._heard += data
        return bool(data)

    def reset(self) -> None:
        """Hang up with RST instead of FIN."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def gone(self, within: float = PROMPTLY) -> None:
        """The daemon has let go of its side."""
        await until(lambda: self._daemon.sockets <= self._others, within + SLACK)


class Fate:
    """What a peer was told before its end, and how long that took."""

    def __init__(self, heard: bytes, seconds: float = 0.0) -> None:
        head, _, self.body = heard.partition(b"\r\n\r\n")
        self.status = int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else None
        self.code = close_code(self.body) if self.status == 101 else None
        self.seconds = seconds


def close_code(frames: bytes) -> int | None:
    peer = Connection(ConnectionType.CLIENT)
    peer.receive_data(frames)
    return next((int(event.code) for event in peer.events() if isinstance(event, CloseConnection)), None)


@asynccontextmanager
async def offender(daemon: Target, port: int) -> AsyncIterator[Offender]:
    others = daemon.sockets
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Offender(stream, daemon, others)


def served(port: int) -> int:
    """The connections on a listening port that a process still has (inode 0: nobody)."""
    fields = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(f[1].endswith(f":{port:04X}") and f[3] != "0A" and f[9] != "0" for f in fields)


async def until(condition: Callable[[], object], seconds: float) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)  # /proc tells nobody when it changes


class room_for_many_files:
    """The usual soft limit of 1024 is less than some tests open, here and in the daemon that inherits it."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_NOFILE)
        _, hard = self._before
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self._before)


# The handshake.


def upgrade(target: str = "/ws", **headers: bytes) -> bytes:
    """A good request for a WebSocket, but for what is said otherwise."""
    fields = {
        "Host": b"127.0.0.1",
        "Connection": b"Upgrade",
        "Upgrade": b"websocket",
        "Sec-WebSocket-Key": b"dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": b"13",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"GET {target} HTTP/1.1".encode(), *(n.encode() + b": " + v for n, v in fields.items())]
    return b"\r\n".join(lines) + b"\r\n\r\n"


UPGRADE = upgrade()
HUGE_HEADERS = b"GET /ws HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1000) for n in range(70))
GARBAGE = bytes(range(256)) + b"\r\n\r\n"

# A WebSocket may be made of bytes that nobody looks at. It is like any other then: without `auth`, it ends.
ACCEPTED = (101, 4004)


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        ("Upgrade", 400, None),
        ("Sec-WebSocket-Version", 426, None),
        ("Origin", 403, None),
        ("Sec-WebSocket-Key", *ACCEPTED),
        ("Authorization", *ACCEPTED),
        ("Cookie", *ACCEPTED),
        ("User-Agent", *ACCEPTED),
        ("X-Forwarded-For", *ACCEPTED),
    ],
)
async def test_a_header_that_is_not_ascii_harms_its_sender_alone(
    daemon: Target, conversation: int, header: str, status: int | None, code: int | None
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.hub_port) as peer:
            await peer.say(upgrade(**{header: b"caf\xc3\xa9\xff"}))
            fate = await peer.fate(AUTH if status == 101 else PROMPTLY)
            assert (fate.status, fate.code) == (status, code)
        await peer.gone()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        pytest.param(
            upgrade(Authorization=b"Bearer caf\xe9"), 101, 4500, id="a bearer token that is not ascii"
        ),
        pytest.param(upgrade(Host=b"[", Origin=b"http://["), 403, None, id="half an IPv6 host"),
        pytest.param(upgrade("/elsewhere"), 404, None, id="another path"),
        pytest.param(upgrade("/ws?token=%ff&conversation_id=%00"), 101, 4500, id="a query that is no text"),
        pytest.param(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n", 400, None, id="no upgrade"),
        pytest.param(b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 400, None, id="a POST"),
        pytest.param(GARBAGE, 400, None, id="garbage"),
        pytest.param(HUGE_HEADERS, 400, None, id="70 kB of headers"),
    ],
)
async def test_a_bad_request_is_refused_at_once(
    daemon: Target, conversation: int, request_: bytes, status: int | None, code: int | None
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.hub_port) as peer:
            await peer.say(request_)
            fate = await peer.fate(PROMPTLY)
            assert (fate.status, fate.code) == (status, code)
        await peer.gone()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(upgrade("//["), id="a path that looks like half an IPv6 host"),
        pytest.param(upgrade("http://[/ws"), id="half an IPv6 host"),
    ],
)
async def test_a_request_that_cannot_be_parsed_is_refused_or_dropped(
    daemon: Target, conversation: int, request_: bytes
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.hub_port) as peer:
            await peer.say(request_)
            assert (await peer.fate(PROMPTLY)).status in (None, 400, 404)
        await peer.gone()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(UPGRADE[:40], id="half a request"),
        pytest.param(UPGRADE[:-2], id="all but the last line"),
    ],
)
async def test_who_does_not_finish_the_handshake_is_cut(
    daemon: Target, conversation: int, words: bytes
) -> None:
    async with undisturbed(daemon, conversation), offender(daemon, daemon.hub_port) as peer:
        await peer.say(words)
        fate = await peer.fate(HANDSHAKE)
        assert fate.status is None
        assert fate.seconds > HANDSHAKE / 2, "it had no chance"
        await peer.gone(0)


async def test_dripping_a_handshake_does_not_extend_its_time(daemon: Target, conversation: int) -> None:
    async with (
        undisturbed(daemon, conversation),
        offender(daemon, daemon.hub_port) as peer,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(peer.drip, UPGRADE * 10, 0.02)
        fate = await peer.fate(HANDSHAKE)
        assert fate.status is None
        await peer.gone(0)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(GARBAGE, id="garbage"),
        pytest.param(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n", id="a plain GET"),
        pytest.param(UPGRADE[:40], id="half a request"),
        pytest.param(UPGRADE, id="a whole request"),
        pytest.param(UPGRADE + GARBAGE, id="a request and garbage"),
        pytest.param(upgrade("/elsewhere"), id="a request that is refused"),
    ],
)
async def test_a_reset_connection_is_forgotten(daemon: Target, conversation: int, words: bytes) -> None:
    async with undisturbed(daemon, conversation):
        for wait in (False, True):  # before the daemon has read it, and after
            async with offender(daemon, daemon.hub_port) as peer:
                await peer.say(words)
                if wait:
                    await trio.testing.wait_all_tasks_blocked(0.02)
                peer.reset()
                await peer.gone()


async def test_connecting_a_thousand_times_and_saying_nothing_costs_others_nothing(
    daemon: Target, conversation: int
) -> None:
    async with undisturbed(daemon, conversation):
        others = daemon.sockets
        async with crowd(daemon.hub_port) as peers:
            await until(lambda: all(map(was_ended, peers)), HANDSHAKE + SLACK)
            await until(lambda: daemon.sockets <= others, SLACK)


@asynccontextmanager
async def crowd(port: int) -> AsyncIterator[list[socket.socket]]:
    """A thousand connections that say nothing."""
    peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(MANY)]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def was_ended(peer: socket.socket) -> bool:
    try:
        return peer.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# Frames, after a handshake and with a good token.


def frame(head: int, payload: bytes = b"") -> bytes:
    """A client's frame, masked with zeros. `head` is FIN, the reserved bits and the opcode."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([head]) + length + bytes(4) + payload


def text(payload: bytes | str) -> bytes:
    return frame(FIN | TEXT, payload.encode() if isinstance(payload, str) else payload)


@asynccontextmanager
async def authenticated(daemon: Target, bearer: bytes) -> AsyncIterator[Offender]:
    async with offender(daemon, daemon.hub_port) as peer:
        await peer.say(upgrade(Authorization=bearer))
        await peer.hear(b'"ready"')
        yield peer


NESTED = b'{"event":"send","conversation_id":1,"content":"x","meta":' + b"[" * 10_000 + b"]" * 10_000 + b"}"


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        pytest.param(frame(FIN | BINARY, b"{}"), 4501, id="a binary frame"),
        pytest.param(text("hello"), 4501, id="no JSON"),
        pytest.param(text(""), 4501, id="an empty message"),
        pytest.param(text("[]"), 4501, id="an array"),
        pytest.param(text('[{"event":"ping"}]'), 4501, id="an array of commands"),
        pytest.param(text("7"), 4501, id="a number"),
        pytest.param(text("NaN"), 4501, id="a number that is none"),
        pytest.param(text('{"event":"ping"}{"event":"ping"}'), 4501, id="two objects"),
        pytest.param(text(b"[" * 10_000), 4501, id="10,000 open brackets"),
        pytest.param(text(NESTED), 4501, id="meta nested 10,000 deep"),
        pytest.param(text(b"{" + b" " * FRAME_LIMIT + b"}"), 1009, id="a frame over 64 KiB"),
        pytest.param(text('{"a":"' + "😀" * 20_000 + '"}'), 1009, id="64 KiB of bytes, not of characters"),
        pytest.param(
            frame(TEXT, b"x" * 40_000) + frame(CONTINUATION, b"x" * 40_000), 1009, id="fragments over 64 KiB"
        ),
        pytest.param(frame(FIN | BINARY, b"x" * 70_000), 1009, id="a binary frame over 64 KiB"),
    ],
)
async def test_a_bad_message_ends_with_its_code(
    daemon: Target, conversation: int, bearer: bytes, attack: bytes, code: int
) -> None:
    async with undisturbed(daemon, conversation):
        async with authenticated(daemon, bearer) as peer:
            await peer.say(attack)
            assert (await peer.fate(PROMPTLY)).code == code
        await peer.gone()


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(text(b"{\xff}"), id="text that is no UTF-8"),
        pytest.param(frame(TEXT, b"\xe2\x82") + frame(FIN | CONTINUATION), id="half a character"),
        pytest.param(b"\x81\x02{}", id="an unmasked frame"),
        pytest.param(frame(FIN | RESERVED | TEXT, b"{}"), id="a reserved bit"),
        pytest.param(frame(FIN | 0x3, b"{}"), id="a reserved opcode"),
        pytest.param(frame(PING_OPCODE), id="a ping in pieces"),
        pytest.param(frame(FIN | PING_OPCODE, b"x" * 126), id="a ping that is too long"),
        pytest.param(frame(FIN | CONTINUATION, b"{}"), id="a continuation of nothing"),
        pytest.param(frame(TEXT) + text("{}"), id="a message within a message"),
        pytest.param(b"\x81\xff" + b"\xff" * 12, id="a length with the top bit"),
        pytest.param(b"\x81\xfe\x00\x01" + bytes(5), id="a length that could be shorter"),
        pytest.param(frame(FIN | CLOSE, b"\x03"), id="half a close code"),
        pytest.param(frame(FIN | CLOSE, struct.pack("!H", 999)), id="close code 999"),
        pytest.param(frame(FIN | CLOSE, struct.pack("!H", 1006)), id="close code 1006"),
        pytest.param(frame(FIN | CLOSE, struct.pack("!H", 5000)), id="close code 5000"),
        pytest.param(frame(FIN | CLOSE, b"\x03\xe8\xff"), id="a close reason that is no UTF-8"),
        pytest.param(GARBAGE, id="garbage"),
    ],
)
async def test_what_is_no_websocket_is_cut_at_once(
    daemon: Target, conversation: int, bearer: bytes, attack: bytes
) -> None:
    async with undisturbed(daemon, conversation), authenticated(daemon, bearer) as peer:
        await peer.say(attack)
        fate = await peer.fate(PROMPTLY)
        assert fate.code in (None, 1002, 1007)
        await peer.gone(0 if fate.code is None else GOODBYE)


async def test_ten_megabytes_are_not_taken_in(daemon: Target, conversation: int, bearer: bytes) -> None:
    async with undisturbed(daemon, conversation), authenticated(daemon, bearer) as peer:
        with trio.fail_after(PROMPTLY + SLACK):
            await peer.say(text(b"x" * 10_000_000))
        assert (await peer.fate(PROMPTLY)).code == 1009
        await peer.gone(0)


async def test_a_message_that_is_announced_and_never_comes_ends_with_silence(
    daemon: Target, conversation: int, bearer: bytes
) -> None:
    async with undisturbed(daemon, conversation):
        async with authenticated(daemon, bearer) as peer:
            await peer.say(b"\x81\xff" + (2**62).to_bytes(8, "big") + bytes(4) + b'{"event"')
            fate = await peer.fate(PING + PONG + 0.5)  # it looks at its clients every quarter of that
            assert fate.code == 4000
        await peer.gone()


async def test_pings_whose_pongs_nobody_reads_are_cut(daemon: Target, conversation: int, bearer: bytes) -> None:
    async with undisturbed(daemon, conversation), authenticated(daemon, bearer) as peer:
        before = daemon.memory
        flood = frame(FIN | PING_OPCODE, b"x" * 125) * 500
        with trio.fail_after(20), suppress(trio.BrokenResourceError):
            while True:
                await peer.stream.send_all(flood)
        await peer.gone(0)
        assert daemon.memory - before < 8 * OUTBOX_LIMIT


async def test_who_ignores_the_goodbye_is_left_without_it(
    daemon: Target, conversation: int, bearer: bytes
) -> None:
    async with undisturbed(daemon, conversation), authenticated(daemon, bearer) as peer:
        await peer.say(frame(FIN | BINARY))
        assert (await peer.fate(PROMPTLY)).code == 4501
        await peer.gone(GOODBYE)


async def test_all_of_this_at_once(daemon: Target, conversation: int, bearer: bytes) -> None:
    words = [b"", UPGRADE[:40], GARBAGE, HUGE_HEADERS, upgrade(Cookie=b"\xff")]
    frames = [NESTED, GARBAGE, text("[]"), frame(TEXT, b"x" * 70_000), text(b"\xff" * 70_000)]
    words += [upgrade(Authorization=bearer) + attack for attack in frames]
    async with undisturbed(daemon, conversation), trio.open_nursery() as nursery:
        for attack in words * 10:
            nursery.start_soon(_strike, daemon, attack)


async def _strike(daemon: Target, attack: bytes) -> None:
    async with offender(daemon, daemon.hub_port) as peer:
        await peer.say(attack)
        await peer.fate(2 * AUTH)


# HTTP, the backend's side: on loopback, but no reason to be soft.


def request(
    method: str = "POST", path: str = "/api/ws/messages", body: bytes = b"", **headers: bytes | None
) -> bytes:
    """A good request that ends its connection, but for what is said otherwise; None leaves a header out."""
    fields: dict[str, bytes | None] = {
        "Host": b"127.0.0.1",
        "Connection": b"close",
        "X-Internal-Token": TOKEN.encode(),
        "Content-Length": str(len(body)).encode(),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1".encode()]
    lines += [name.encode() + b": " + value for name, value in fields.items() if value is not None]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def message(conversation: int, client_id: str, content: str = "once") -> bytes:
    fields = {"conversation_id": conversation, "sender_id": MEMBER, "content": content}
    return json.dumps(fields | {"client_id": client_id}).encode()


CHUNKED: dict[str, bytes | None] = {"Content_Length": None, "Transfer_Encoding": b"chunked"}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(HUGE_HEADERS, 431, id="70 kB of headers"),
        pytest.param(GARBAGE, 400, id="garbage"),
        pytest.param(request(body=b"{"), 400, id="no JSON"),
        pytest.param(request(body=b'"\xff"'), 400, id="no UTF-8"),
        pytest.param(request(body=b"[" * 10_000), 400, id="10,000 open brackets"),
        pytest.param(request(body=NESTED), 400, id="meta nested 10,000 deep"),
        pytest.param(request(body=b"[]"), 422, id="an array"),
        pytest.param(request(body=b" " * 300_000), 413, id="a body over the limit"),
        pytest.param(request(Content_Length=b"9" * 20), 413, id="a body that is announced"),
        pytest.param(
            request(**CHUNKED) + (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 6 + b"0\r\n\r\n",
            413,
            id="a chunked body over the limit",
        ),
        pytest.param(request(**CHUNKED) + b"nonsense\r\n", 400, id="a chunk of no size"),
        pytest.param(request(Content_Length=b"-1"), 400, id="a negative length"),
        pytest.param(request(X_Internal_Token=b"caf\xc3\xa9\xff"), 401, id="a token that is not ascii"),
        pytest.param(request(X_Internal_Token=None), 401, id="no token"),
        pytest.param(request("GET", "/nowhere", X_Internal_Token=b"x"), 401, id="no token, no such path"),
        pytest.param(request("GET", "/nowhere"), 404, id="no such path"),
        pytest.param(request("GET", "/api/ws/messages/" + "9" * 5000), 405, id="a long number"),
        pytest.param(request("GET", "/healthz", Host=b"\xff["), 200, id="a host that is none"),
    ],
)
async def test_a_bad_http_request_gets_its_status_and_its_end(
    daemon: Target, conversation: int, request_: bytes, status: int | None
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(request_)
            assert (await peer.fate(PROMPTLY)).status == status
        await peer.gone()


@pytest.mark.parametrize("target", ["?", "http://[", "http://[/healthz"])
async def test_a_target_that_is_no_path_is_the_askers_mistake(
    daemon: Target, conversation: int, target: str
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(request("GET", target, X_Internal_Token=None))
            assert (await peer.fate(PROMPTLY)).status in (400, 401, 404)
        await peer.gone()


@pytest.mark.parametrize("hang_up", ["reset", "close"])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(GARBAGE, id="garbage"),
        pytest.param(b"POST /api/ws/messages HTTP/1.1\r\nHo", id="half a request"),
        pytest.param(request(body=b"{}")[:-1], id="half a body"),
        pytest.param(request("GET", "/healthz"), id="a whole request"),
    ],
)
async def test_an_http_client_that_hangs_up_is_forgotten(
    daemon: Target, conversation: int, words: bytes, hang_up: str
) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(words)
            if hang_up == "reset":
                peer.reset()
        await peer.gone()


async def test_a_kept_connection_that_is_hung_up_is_forgotten(daemon: Target, conversation: int) -> None:
    """Backends in PHP hang up after every request of theirs, without saying so before."""
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(request("GET", "/healthz", Connection=None))
            await peer.hear(b'{"status":"ok"}')
            await trio.testing.wait_all_tasks_blocked(0.05)  # not before the daemon waits for the next one
        await peer.gone()


async def test_half_a_body_is_not_stored(daemon: Target, conversation: int) -> None:
    async with undisturbed(daemon, conversation):
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(request(body=message(conversation, "half"))[:-1])
        await peer.gone()


async def test_connection_close_gets_its_answer_and_the_end(daemon: Target) -> None:
    async with offender(daemon, daemon.api_port) as peer:
        await peer.say(request("GET", "/healthz"))
        fate = await peer.fate(PROMPTLY)
        assert (fate.status, fate.body) == (200, b'{"status":"ok"}\n')
        await peer.gone(0)


async def test_a_connection_that_is_kept_serves_many_requests(daemon: Target, conversation: int) -> None:
    def ask() -> list[tuple[int, int]]:
        kept = http.client.HTTPConnection("127.0.0.1", daemon.api_port, timeout=PROMPTLY + SLACK)
        found = []
        for number in range(3):
            kept.request(
                "POST",
                "/api/ws/messages",
                message(conversation, f"kept-{number}"),
                {"X-Internal-Token": TOKEN},
            )
            answer = kept.getresponse()
            assert json.loads(answer.read())["seq"] == number + 1
            found.append((answer.status, kept.sock.getsockname()[1]))
        kept.close()
        return found

    answers = await trio.to_thread.run_sync(ask)
    assert answers == [(200, answers[0][1])] * 3


@pytest.mark.parametrize("hang_up", ["reset", "close"])
async def test_who_hangs_up_and_tries_again_has_written_once(
    daemon: Target, conversation: int, hang_up: str
) -> None:
    """Wherever the hanging up meets the write, the retry finds all of it or nothing."""
    tries = 30
    for number in range(tries):
        body = message(conversation, f"once-{number}")
        async with offender(daemon, daemon.api_port) as peer:
            await peer.say(request(body=body))
            if number % 3:
                await trio.testing.wait_all_tasks_blocked(0.0005 * (number % 7))  # another moment each time
            if hang_up == "reset":
                peer.reset()
        answer = await trio.to_thread.run_sync(
            partial(daemon.request, "POST", "/api/ws/messages", body),
        )
        assert (answer.status, answer.json["seq"]) == (200, number + 1)
    page = await trio.to_thread.run_sync(daemon.get, f"/api/ws/conversations/{conversation}/messages?limit=100")
    assert [m["client_id"] for m in page.json["messages"]] == [f"once-{n}" for n in range(tries)]
    assert [m["seq"] for m in page.json["messages"]] == list(range(1, tries + 1))


async def test_a_thousand_silent_http_connections_cost_others_nothing(
    daemon: Target, conversation: int
) -> None:
    async with undisturbed(daemon, conversation):
        others = daemon.sockets
        async with crowd(daemon.api_port):
            await trio.to_thread.run_sync(daemon.post, conversation + 10**6, MEMBER, "in the crowd")
            await until(lambda: daemon.sockets <= others + MANY // 4, 2 * SLACK)  # most had to make room
        await until(lambda: daemon.sockets <= others, 2 * SLACK)
