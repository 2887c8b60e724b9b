"""Places for those whom nobody knows yet: whoever says who it is gets in, however many say nothing."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
import trio

from chatd.api.connection import HEAD_SECONDS, LINGER
from chatd.hub.admission.handshake_rate import SHARE, HandshakeRate
from chatd.net import lobby
from chatd.net.gate import Gate
from chatd.net.lobby import Lobby, Stay
from tests.backend import Asked, serving
from tests.client import connect, login
from tests.conftest import Daemons
from tests.daemon import TOKEN, Daemon

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture
def few(daemons: Daemons) -> Daemon:
    """With descriptors for a few dozen clients, and much patience."""
    return daemons(open_files=120, hub__handshake_timeout=60, hub__auth_timeout=60)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def knock(daemon: Daemon, held: ExitStack, first: bytes) -> socket.socket:
    peer = held.enter_context(socket.create_connection(("127.0.0.1", daemon.hub_port), 5))
    peer.sendall(first)
    return peer


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


@pytest.mark.parametrize(
    "first", [b"", b"GET /ws HTTP/1.1\r\nX-A: ", UPGRADE], ids=["silent", "half", "upgraded"]
)
async def test_who_logs_in_gets_in_beside_those_who_never_do(
    few: Daemon, held: ExitStack, first: bytes
) -> None:
    for _ in range(150):
        knock(few, held, first)
    with trio.fail_after(20):
        async with login(few, 7) as client:
            assert (await client.request("ping"))["event"] == "pong"


async def test_a_backend_that_takes_its_time_sends_nobody_away(daemons: Daemons, held: ExitStack) -> None:
    def slow(asked: Asked) -> tuple[int, Any]:
        if asked.json["token"] == "slow":
            time.sleep(2)
        return 200, {"user_id": 7, "expires_in": 60}

    with serving() as backend:
        backend.answer = slow
        patience = {"hub__handshake_timeout": 60, "hub__auth_timeout": 60, "auth__backend_timeout": 20}
        daemon = daemons(open_files=120, auth__backend_url=backend.url, **patience)
        async with connect(daemon.ws_url) as client:
            await client.expect("hello")
            await client.send("auth", ref=1, token="slow")
            while not backend.asked:
                await trio.sleep(0.01)
            for _ in range(150):
                knock(daemon, held, UPGRADE)
            with trio.fail_after(20):
                assert (await client.expect("ready"))["ref"] == 1


async def test_who_is_logged_in_is_not_sent_away_for_who_comes(few: Daemon, held: ExitStack) -> None:
    async with login(few, 7) as client:
        for _ in range(150):
            knock(few, held, UPGRADE)
        async with login(few, 8):
            assert (await client.request("ping"))["event"] == "pong"


@pytest.mark.parametrize("how", ["closes", "resets", "half a request"])
async def test_who_hangs_up_before_its_handshake_gives_its_place_back(few: Daemon, how: str) -> None:
    before = descriptors(few)
    for _ in range(30):
        with ExitStack() as stack:
            peer = knock(few, stack, b"GET /ws HTTP/1.1\r\n" if how == "half a request" else b"")
            if how == "resets":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with trio.fail_after(10):
        while descriptors(few) > before + 5:
            await trio.sleep(0.05)


async def test_the_api_answers_beside_those_who_ask_for_nothing(few: Daemon, held: ExitStack) -> None:
    for _ in range(150):
        held.enter_context(socket.create_connection(("127.0.0.1", few.api_port), 5))
    with trio.fail_after(8):  # less than anybody's patience
        assert (await trio.to_thread.run_sync(few.post, 1, 7, "x"))["seq"] == 1
        async with login(few, 7):
            assert (await trio.to_thread.run_sync(few.post, 1, 7, "x"))["seq"] == 2


CROWD = 100
READS_NOT = b"-"
# What a peer of the API says first, and then again and again.
HALF_OPEN = {
    "silent": (b"", b""),
    "reads nothing": (b"GET /docs HTTP/1.1\r\nHost: a\r\n\r\n" * 200, READS_NOT),
    "half a head": (b"GET /healthz HTTP/1.1\r\nX-A: ", b""),
    "dripping head": (b"GET /healthz HTTP/1.1\r\nX-A: ", b"x"),
    "dripping body": (b"POST /api/ws/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n", b" "),
    "of a backend": (
        b"POST /api/ws/messages HTTP/1.1\r\nHost: a\r\nX-Internal-Token: %s\r\nContent-Length: 9999\r\n\r\n"
        % TOKEN.encode(),
        b" ",
    ),
    "pipelined": (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 5, b""),
}


class Flood:
    """So many connections to the API, from a thread: it opens another for each that ends, while it `renews`."""

    def __init__(self, port: int, first: bytes, then: bytes) -> None:
        self._port, self._first, self._then = port, first, then
        self.renews = True
        self._peers: dict[socket.socket, bool] = {}  # and whether they have said the first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for peer in self._peers:
            peer.close()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            while self.renews and len(self._peers) < CROWD:
                peer = socket.socket()
                peer.setblocking(False)
                with suppress(BlockingIOError):
                    peer.connect(("127.0.0.1", self._port))
                self._peers[peer] = False
            for peer in list(self._peers):
                if not self._talk(peer):
                    peer.close()
                    del self._peers[peer]

    def _talk(self, peer: socket.socket) -> bool:
        """False where the connection has ended."""
        try:
            if not self._peers[peer]:
                peer.send(self._first)
                self._peers[peer] = True
            if self._then == READS_NOT:
                return True
            peer.send(self._then)
            return peer.recv(65536) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False


@pytest.mark.parametrize("kind", HALF_OPEN)
async def test_the_api_serves_its_backend_beside_half_open_requests(few: Daemon, kind: str) -> None:
    before = descriptors(few)
    with Flood(few.api_port, *HALF_OPEN[kind]) as flood:
        await trio.sleep(1)
        if kind != "of a backend":  # whoever knows the token is trusted: its time is bounded, not its number
            for seq in range(1, 11):
                assert (await trio.to_thread.run_sync(few.post, 1, 7, "x"))["seq"] == seq
                assert descriptors(few) < before + 40
            async with login(few, 7):
                pass
        flood.renews = False
        with trio.fail_after(HEAD_SECONDS + LINGER + 10):
            while descriptors(few) > before + 3:
                await trio.sleep(0.1)
        assert (await trio.to_thread.run_sync(few.post, 2, 7, "x"))["seq"] == 1
    if kind != "of a backend":
        ended = few.get("/metrics").body.decode()
        assert 'chatd_unknown_connections_ended_total{port="api"}' in ended
        assert '"unknown_connections_ended"' in few.log


class Peer:
    """A stream and what it has sent, as far as a lobby looks at it."""

    def __init__(self, held: ExitStack) -> None:
        ours, self.theirs = socket.socketpair()
        held.enter_context(ours)
        held.enter_context(self.theirs)
        self.socket = ours


@pytest.fixture
def hall() -> Lobby:
    return Lobby("hub", 8)


@pytest.fixture
async def gate(hall: Lobby, held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    """At which the addresses of this machine are as good as those of others."""
    monkeypatch.setattr(lobby, "is_loopback", lambda _: False)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1000)
    async with Gate(listener, trio.Semaphore(1000), lobby=hall) as gate:
        yield gate


def come(gate: Gate, address: str = "127.0.0.1") -> socket.socket:
    """Somebody who connects from there, and says nothing."""
    return socket.create_connection(gate._listener.socket.getsockname(), 5, source_address=(address, 0))


async def test_nobody_waits_behind_a_crowd_of_another_address(gate: Gate, hall: Lobby, held: ExitStack) -> None:
    stays = [Stay(hall, Peer(held), "127.0.0.2", int) for _ in range(hall.most)]  # type: ignore[arg-type]
    for stay in stays:
        stay.since -= lobby.GRACE
    for n in range(400):
        comes = held.enter_context(come(gate, "127.0.0.2"))
        if n % 2:
            comes.sendall(UPGRADE)
    held.enter_context(come(gate, "127.0.0.3"))
    began, let_in = trio.current_time(), 0
    with ExitStack() as served:
        while lobby.key_of(peer := await gate.accept()) == "127.0.0.2":
            served.callback(peer.socket.close)
            assert not lobby.is_silent(peer)
            Stay(hall, peer, "127.0.0.2", int)
            let_in += 1
        peer.socket.close()
    assert 0 < let_in < 2 + 10 * (trio.current_time() - began), "some of the crowd come in, too"


async def test_many_of_an_address_who_have_just_come_are_let_in(
    gate: Gate, hall: Lobby, held: ExitStack
) -> None:
    """They may have lost their connections all at once."""
    for _ in range(20):
        held.enter_context(come(gate, "127.0.0.2"))
    with ExitStack() as served, trio.fail_after(5):
        for _ in range(20):
            served.callback((peer := await gate.accept()).socket.close)
            Stay(hall, peer, "127.0.0.2", int)


@pytest.mark.parametrize("last", ["nothing", "half a request", "a reset"])
async def test_who_has_hung_up_already_is_not_served(gate: Gate, held: ExitStack, last: str) -> None:
    for _ in range(20):
        with come(gate) as peer:
            if last == "half a request":
                peer.sendall(b"GET /ws HTTP/1.1\r\n")
            elif last == "a reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    held.enter_context(here := come(gate))
    async with await gate.accept() as peer:
        assert peer.socket.getpeername() == here.getsockname()


async def test_the_oldest_silent_one_of_a_crowd_goes_first(hall: Lobby, held: ExitStack) -> None:
    ended: list[str] = []
    for name, address in (("a1", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b")):
        peer = Peer(held)
        Stay(hall, peer, address, partial(ended.append, name))  # type: ignore[arg-type]
        if name == "b1":
            peer.theirs.sendall(b"GET")
    assert hall.make_room()
    assert hall.make_room()
    assert ended == ["b2", "b3"]
    assert not hall.make_room(), "nobody holds many, and all have just come"


async def test_who_shares_an_address_with_all_has_a_moment(hall: Lobby, held: ExitStack) -> None:
    ended: list[int] = []
    stays = [Stay(hall, Peer(held), "", partial(ended.append, n)) for n in range(8)]  # type: ignore[arg-type]
    assert hall.full
    assert not hall.make_room()
    for stay in stays[:2]:
        stay.since -= lobby.GRACE
    stays[0].leave()
    assert hall.make_room()
    assert ended == [1]
    stays[1].leave()  # again: it has gone
    assert len(hall) == 6


async def test_in_a_hurry_the_oldest_goes_whom_we_do_not_work_on(hall: Lobby, held: ExitStack) -> None:
    ended: list[int] = []
    stays = [Stay(hall, Peer(held), "", partial(ended.append, n)) for n in range(3)]  # type: ignore[arg-type]
    assert not hall.make_room()
    with stays[0].our_turn():
        assert hall.make_room(hurry=True)
        assert hall.make_room(hurry=True)
        assert not hall.make_room(hurry=True)
    assert ended == [1, 2]


async def test_whom_we_keep_waiting_is_not_silent(hall: Lobby, held: ExitStack) -> None:
    ended: list[int] = []
    stays = [Stay(hall, Peer(held), "", partial(ended.append, n)) for n in range(8)]  # type: ignore[arg-type]
    for stay in stays[:2]:
        stay.since -= lobby.GRACE
    with stays[0].our_turn():
        assert hall.make_room()
        assert not hall.make_room()
        assert ended == [1]
    assert not hall.make_room(), "it has its own moment after ours"
    stays[0].since -= lobby.GRACE
    assert hall.make_room()
    with stays[0].our_turn():
        pass
    assert len(hall) == 6, "who was sent away does not come back by that"


async def test_of_a_crowd_that_we_keep_waiting_the_last_goes(hall: Lobby, held: ExitStack) -> None:
    """So that those before it get done."""
    ended: list[int] = []
    with ExitStack() as turns:
        for n in range(4):
            stay = Stay(hall, Peer(held), "a", partial(ended.append, n))  # type: ignore[arg-type]
            if n != 2:
                turns.enter_context(stay.our_turn())
        stay = Stay(hall, dripping := Peer(held), "a", partial(ended.append, 4))  # type: ignore[arg-type]
        dripping.theirs.sendall(b"GET")
        for _ in range(4):
            assert hall.make_room()
    assert ended == [2, 4, 3, 1]


async def test_no_address_uses_up_the_handshakes_of_others() -> None:
    handshakes = HandshakeRate(100)
    taken = sum(handshakes.take("crowd") for _ in range(1000))
    assert 100 <= taken <= 120
    for n in range(10):
        assert handshakes.take(f"other {n}")
        assert not handshakes.take("crowd")
    assert sum(handshakes.take("one other") for _ in range(100)) >= 100 // SHARE
