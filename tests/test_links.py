"""Links that are slow, full or silent: what counts as a sign of life, what a slow reader costs, how a goodbye
arrives. Real sockets; the deadlines are those of an impatient configuration.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, RejectConnection, Request, TextMessage

from chatd.core.errors import Final
from tests.conftest import Daemons
from tests.daemon import Daemon

PING, PONG = 0.5, 0.5  # seconds: the daemon's patience
SLACK = 3.0
PATIENCE = 30.0
FRAME_LIMIT = 65536


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    impatient = Daemon(
        tmp_path_factory.mktemp("daemon"),
        hub__allow_query_token="true",
        hub__auth_timeout=1.0,
        hub__ping_interval=PING,
        hub__ping_timeout=PONG,
        limits__sends_per_second=0,
        limits__connections_per_user=0,
    )
    yield impatient.start()
    impatient.close()


class Peer:
    """A client whose every byte is read when the test says so. It answers no ping by itself."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.read = 0  # bytes
        self.refused = 0  # the status of an answer that was no 101
        self.code: int | None = None  # of the close frame
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._text = ""

    async def shake_hands(self, target: str) -> None:
        await self.stream.send_all(self._ws.send(Request(host="127.0.0.1", target=target)))
        with trio.fail_after(PATIENCE):
            while not await self.some():
                pass

    async def send(self, event: str, **fields: Any) -> None:
        await self.stream.send_all(self._ws.send(Message(data=json.dumps({"event": event} | fields))))

    async def some(self, most: int = 65536) -> list[dict[str, Any]]:
        """What comes next: whole events, `{}` for the 101. Sets `code` or `refused` at the end."""
        data = await self.stream.receive_some(most)
        self.read += len(data)
        if not data:
            raise trio.EndOfChannel
        self._ws.receive_data(data)
        found: list[dict[str, Any]] = []
        for event in self._ws.events():
            match event:
                case AcceptConnection():
                    found.append({})
                case RejectConnection():
                    self.refused = event.status_code
                    found.append({})
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        found.append(json.loads(self._text))
                        self._text = ""
                case CloseConnection():
                    self.code = int(event.code)
        return found

    async def until(self, name: str, most: int = 65536) -> dict[str, Any]:
        with trio.fail_after(PATIENCE):
            while True:
                for event in await self.some(most):
                    if event.get("event") == name:
                        return event

    async def end(self) -> int | None:
        """Read on until there is nothing more: the code of the goodbye, None where there was none."""
        with trio.fail_after(PATIENCE), contextlib.suppress(trio.EndOfChannel, trio.BrokenResourceError):
            while True:
                await self.some()
        return self.code


@asynccontextmanager
async def peer(daemon: Daemon, target: str = "/ws", *, buffer: int = 0) -> AsyncIterator[Peer]:
    """`buffer`: bytes that the kernel keeps for it, if few."""
    connection = trio.socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await connection.connect(("127.0.0.1", daemon.hub_port))
    async with trio.SocketStream(connection) as stream:
        one = Peer(stream)
        await one.shake_hands(target)
        yield one


@asynccontextmanager
async def reader(daemon: Daemon, conversation: int, **options: Any) -> AsyncIterator[Peer]:
    """A peer that is in a room."""
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    async with peer(daemon, **options) as one:
        await one.send("auth", ref=1, token=token, rooms={conversation: None})
        await one.until("ready")
        yield one


async def fill(daemon: Daemon, conversation: int, count: int, size: int) -> None:
    messages = [{"conversation_id": conversation, "sender_id": 2, "content": "x" * size}] * count

    def post() -> None:
        assert daemon.request("POST", "/api/ws/messages/batch", {"messages": messages}).status == 200

    await trio.to_thread.run_sync(post)


def waiting(daemon: Daemon) -> int:
    """Bytes that the kernel holds in the daemon's end of its clients' connections, /proc/net/tcp(5)."""
    port, found = f":{daemon.hub_port:04X}", 0
    with open("/proc/net/tcp") as table:
        for line in table:
            _, local, _, state, queues, *_ = line.split()
            if local.endswith(port) and state == "01":
                found += int(queues.split(":")[0], 16)
    return found


# Signs of life.


async def test_bytes_that_move_are_a_sign_of_life(daemon: Daemon, conversation: int) -> None:
    """A ping waits behind what was sent before it. A slow link is not silent while they arrive."""
    async with reader(daemon, conversation, buffer=4096) as slow:
        await fill(daemon, conversation, 50, 6000)
        started, last, before = trio.current_time(), 0, slow.read
        while last < 50:
            for event in await slow.some(4096):
                last = event.get("seq", last)
            await trio.sleep(4096 / 75_000)  # 4 s for all of it: four times what silence is given
        assert slow.read - before > 300_000
        assert trio.current_time() - started > 2 * (PING + PONG)
        await slow.send("pong")
        await slow.send("ping", ref=7)
        assert (await slow.until("pong"))["ref"] == 7


async def test_a_peer_that_takes_nothing_is_found_in_time(daemon: Daemon, conversation: int) -> None:
    async with reader(daemon, conversation, buffer=4096) as stuck:
        await fill(daemon, conversation, 50, 6000)
        assert waiting(daemon)
        with trio.fail_after(PING + PONG + 3 * SLACK):
            while not any("4000" in line for line in daemon.log.splitlines() if "closed" in line):
                await trio.sleep(0.05)
        assert stuck.code is None


async def test_a_peer_that_takes_all_and_says_nothing_is_found_in_time(
    daemon: Daemon, conversation: int
) -> None:
    """Its kernel acknowledges whatever comes, also the ping: that is no answer."""
    async with reader(daemon, conversation) as mute, trio.open_nursery() as nursery:

        async def talk() -> None:
            while True:
                await fill(daemon, conversation, 1, 10)
                await trio.sleep(0.1)

        nursery.start_soon(talk)
        started = trio.current_time()
        assert await mute.end() == 4000
        assert PING + PONG - 0.2 < trio.current_time() - started < PING + PONG + SLACK
        nursery.cancel_scope.cancel()


async def test_a_resume_over_a_slow_link_succeeds_and_goes_on_where_it_was_cut(
    daemon: Daemon, conversation: int
) -> None:
    """In pieces, each when the link has taken the one before; what is said meanwhile comes after them."""
    rooms = range(conversation * 10, conversation * 10 + 4)
    for room in rooms:
        await fill(daemon, room, 100, 1000)
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    cursors: dict[int, Any] = {room: {"after": 0, "mark": None} for room in rooms}
    seen: dict[int, list[int]] = {room: [] for room in rooms}

    def take(event: dict[str, Any]) -> None:
        room = event.get("conversation_id", 0)
        if event["event"] == "subscribed":
            assert event["recovered"]
            assert len(json.dumps(event, separators=(",", ":"))) <= 32 * 1024
            seen[room] += [change["seq"] for change in event["changes"]]
        elif event["event"] == "message":
            seen[room].append(event["seq"])
        else:
            return
        cursors[room] = {"after": event["seq"], "mark": event["mark"]}

    cuts = 0
    while any(len(found) < 101 for found in seen.values()):
        cuts += 1
        assert cuts < 10
        async with peer(daemon, buffer=4096) as slow:
            await slow.send("auth", ref=1, token=token, rooms={str(room): cursors[room] for room in rooms})
            ready = await slow.until("ready")
            for answer in ready["rooms"].values():
                take({"event": "subscribed"} | answer)
            if cuts == 1:
                for room in rooms:
                    await fill(daemon, room, 1, 1000)
            started = trio.current_time()
            while any(len(found) < 101 for found in seen.values()):
                for event in await slow.some(8192):
                    take(event)
                    if event["event"] == "ping":
                        await slow.send("pong")
                await trio.sleep(8192 / 150_000)
                if cuts == 1 and trio.current_time() - started > 1:
                    break  # the link is cut
    assert cuts == 2
    assert all(found == list(range(1, 102)) for found in seen.values())


async def test_who_is_removed_in_the_middle_of_a_replay_hears_no_more(
    daemons: Daemons, conversation: int
) -> None:
    daemon = await trio.to_thread.run_sync(lambda: daemons(rooms__access="members"))
    member = f"/api/ws/conversations/{conversation}/members/1"
    await fill(daemon, conversation, 30, 8000)
    await trio.to_thread.run_sync(daemon.request, "PUT", member)
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    async with peer(daemon, buffer=4096) as slow:
        await slow.send("auth", ref=1, token=token, rooms={str(conversation): 0})
        await slow.until("subscribed", 2048)
        await trio.to_thread.run_sync(daemon.request, "DELETE", member)
        ended = await slow.until("unsubscribed")
        assert ended["conversation_id"] == conversation
        await slow.send("ping", ref=2)
        pong = await slow.until("pong")
        assert pong["ref"] == 2
        assert slow.read < 240_000


# What a slow reader costs: G8.


@pytest.mark.parametrize("batches_before", [0, 20])
async def test_a_slow_reader_costs_a_mebibyte_with_what_the_kernel_holds(
    daemons: Daemons, conversation: int, batches_before: int
) -> None:
    """Also one that has read fast for a while: for that the kernel would make more room.

    Here half an outbox waits, and a piece; what follows is in the database.
    """
    daemon = await trio.to_thread.run_sync(daemons)
    async with reader(daemon, conversation, buffer=0 if batches_before else 4096) as slow:
        for batch in range(1, batches_before + 1):
            await fill(daemon, conversation, 20, 8000)
            last = 0
            while last < 20 * batch:
                for event in await slow.some():
                    last = event.get("seq", last)
        most = 0
        for _ in range(20):
            await fill(daemon, conversation, 20, 8000)
            most = max(most, waiting(daemon))
        assert 0 < most < 256 * 1024
        depths = await samples(daemon, "chatd_send_queue_depth_bucket")
        assert depths['le="262144.0"'] < depths['le="524288.0"'] == depths['le="+Inf"']


async def samples(daemon: Daemon, name: str) -> dict[str, float]:
    """By their labels."""
    page = await trio.to_thread.run_sync(daemon.get, "/metrics")
    found = (line[len(name) + 1 :] for line in page.body.decode().splitlines() if line.startswith(name + "{"))
    return {labels: float(value) for labels, _, value in (line.partition("} ") for line in found)}


async def closed_with(daemon: Daemon, code: int) -> bool:
    page = await trio.to_thread.run_sync(daemon.get, "/metrics")
    return f'chatd_connections_closed_total{{code="{code}"}}'.encode() in page.body


# How a goodbye arrives: a reset must not overtake it.

SIZES = [FRAME_LIMIT + 500, 100_000, 300_000, 1_000_000, 7_000_000]


@pytest.mark.parametrize("size", SIZES)
async def test_who_sends_too_much_sees_1009(daemon: Daemon, conversation: int, size: int) -> None:
    """It sends all of it before it reads, as browsers do."""
    async with reader(daemon, conversation) as one:
        with trio.fail_after(PATIENCE):
            await one.stream.send_all(one._ws.send(Message(data="h" * size)))
        assert await one.end() == 1009


@pytest.mark.parametrize(
    ("first", "code"),
    [(b"\x82\x80mask", 4501), (b"\x81\x83maskabc", 4501), (b"\xf1\x80mask", 1002)],
    ids=["binary", "no JSON", "reserved bits"],
)
async def test_a_goodbye_arrives_whatever_else_is_sent(
    daemon: Daemon, conversation: int, first: bytes, code: int
) -> None:
    async with reader(daemon, conversation) as one:
        with trio.fail_after(PATIENCE):
            await one.stream.send_all(first + b"\x81\xfe\xff\x00mask" + bytes(2_000_000))
        assert await one.end() == code


async def test_a_login_that_is_refused_is_told_so_whatever_else_is_sent(daemon: Daemon) -> None:
    async with peer(daemon) as one:
        await one.send("auth", ref=1, token="no token")
        with trio.fail_after(PATIENCE):
            await one.stream.send_all(b"\x81\xfe\xff\x00mask" + bytes(2_000_000))
        assert await one.end() == 4500


async def test_a_handshake_that_is_refused_is_answered_whatever_else_is_sent(daemon: Daemon) -> None:
    request = b"GET /elsewhere HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    request += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", daemon.hub_port) as stream:
        with trio.fail_after(PATIENCE):
            await stream.send_all(request + bytes(2_000_000))
            answer = b""
            while data := await stream.receive_some():
                answer += data
        assert answer.startswith(b"HTTP/1.1 404")


async def test_who_goes_on_for_ever_after_a_goodbye_is_left(daemon: Daemon) -> None:
    """The lingering close has an end in bytes and in time."""
    async with peer(daemon) as one:
        await one.stream.send_all(b"\x82\x80mask\x81\xfe\xff\x00mask")
        sent = 0
        with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
            while True:
                await one.stream.send_all(bytes(65536))
                sent += 65536
        assert sent < 128 * 1024 * 1024


# The trivial client has nothing but its 101 that tells it that it is in.


async def test_what_is_posted_after_the_101_of_a_trivial_client_arrives(daemon: Daemon) -> None:
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    for conversation in range(10**6, 10**6 + 60):
        async with peer(daemon, f"/ws?token={token}&conversation_id={conversation}") as one:
            await trio.to_thread.run_sync(daemon.post, conversation, 2, "right after")
            assert (await one.until("message"))["content"] == "right after"


async def test_nothing_comes_before_the_101_of_a_trivial_client(daemons: Daemons) -> None:
    """Others of the same user come meanwhile, and each of the user's connections is asked whether it lives."""
    daemon = await trio.to_thread.run_sync(
        lambda: daemons(hub__allow_query_token="true", limits__connections_per_user=2)
    )
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    ends: list[int] = []

    async def come() -> None:
        async with peer(daemon, f"/ws?token={token}&conversation_id=1") as one:
            ends.append(one.refused)

    for _ in range(5):
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(come)
    assert ends == [0] * 60


class SlowLogins(Daemon):
    """Once it has looked whether a login counts, it makes the file `looked` and waits for the file `go`."""

    planted = """
import pathlib, trio
from chatd.cli import main
from chatd.chat.logins import Logins

look = Logins.standings

async def slow(self, user_ids):
    found = await look(self, user_ids)
    pathlib.Path("looked").touch()
    while not pathlib.Path("go").exists():
        await trio.sleep(0.01)
    return found

Logins.standings = slow
main()
"""

    def program(self) -> list[str]:
        return [sys.executable, "-c", self.planted]


@pytest.mark.service
async def test_a_trivial_client_that_is_banned_while_it_comes_in_is_sent_away(tmp_path: Path) -> None:
    """And not by the next sweep: what the database said of its login is older than the ban."""
    daemon = SlowLogins(tmp_path, hub__allow_query_token="true")
    try:
        await trio.to_thread.run_sync(daemon.start)
        token = await trio.to_thread.run_sync(daemon.token_for, 1)

        async def ban() -> None:
            with trio.fail_after(PATIENCE):
                while not (tmp_path / "looked").exists():
                    await trio.sleep(0.01)
            answer = await trio.to_thread.run_sync(daemon.request, "PUT", "/api/ws/users/1/ban", {})
            assert answer.status == 200
            (tmp_path / "go").touch()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ban)
            async with peer(daemon, f"/ws?token={token}&conversation_id=1") as one:
                with trio.fail_after(2):
                    while one.code is None:
                        await one.some()
                assert one.code == Final.BANNED.code
    finally:
        await trio.to_thread.run_sync(daemon.close)


async def test_a_trivial_client_stays_longer_than_a_login_may_take(daemon: Daemon, conversation: int) -> None:
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    async with peer(daemon, f"/ws?token={token}&conversation_id={conversation}") as one:
        with trio.move_on_after(1.5):  # more than hub.auth_timeout
            while True:
                await one.stream.send_all(b"\x8a\x80mask")
                await trio.sleep(0.1)
        await trio.to_thread.run_sync(daemon.post, conversation, 2, "still there")
        assert (await one.until("message"))["content"] == "still there"


async def test_a_trivial_client_is_not_present(daemon: Daemon, conversation: int) -> None:
    """Its library answers pings also while its page is frozen, and it never says what it has received."""

    def ask(path: str) -> Any:
        return daemon.get(f"/api/ws/{path}").json

    daemon.request("PUT", f"/api/ws/conversations/{conversation}/members/{conversation}", {})
    token = await trio.to_thread.run_sync(daemon.token_for, conversation)
    async with peer(daemon, f"/ws?token={token}&conversation_id={conversation}") as one:
        posted = await trio.to_thread.run_sync(daemon.post, conversation, 2, "is anybody there?")
        await one.until("message")
        user = await trio.to_thread.run_sync(ask, f"users/{conversation}")
        assert (user["online"], user["connections"]) == (False, 0)
        assert (await trio.to_thread.run_sync(ask, f"conversations/{conversation}"))["online"] == []
        delivery = await trio.to_thread.run_sync(ask, f"messages/{posted['id']}/delivery")
        assert (delivery["online"], delivery["pending"]) == ([], [conversation])
