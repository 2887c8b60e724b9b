"""The life of an HTTP connection: what a client may do on it, and what becomes of it when the daemon stops.

A request that was read whole is answered, whatever the client or a timer does at the same moment.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from chatd.api import connection
from chatd.api.connection import Connection, HypercornConfig
from chatd.api.leave import Leave
from chatd.api.strangers import BURST, RATE, Strangers
from chatd.net.lobby import Lobby
from tests.conftest import Daemons
from tests.daemon import TOKEN, Daemon

MESSAGES = "/api/ws/messages"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 5.0  # seconds


def post(
    content: str, *, conversation: int = 1, version: str = "1.1", body: bool = True, **headers: str
) -> bytes:
    """A request as bytes; without `body` its head alone."""
    text = json.dumps({"conversation_id": conversation, "sender_id": 1, "content": content}).encode()
    given = {"Host": "x", "X-Internal-Token": TOKEN, "Content-Type": "application/json"}
    given |= {"Content-Length": str(len(text))} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    lines = [f"POST {MESSAGES} HTTP/{version}", *(f"{key}: {value}" for key, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + (text if body else b"")


@contextmanager
def talk(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", daemon.api_port), timeout=PATIENCE) as peer:
        yield peer


def rest(peer: socket.socket) -> bytes:
    """All that comes until the server closes."""
    got = b""
    while data := peer.recv(65536):
        got += data
    return got


def statuses(answers: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", answers)]


def answer(peer: socket.socket) -> tuple[int, str, Any]:
    """One answer: its status, its Connection header, its body."""
    got = b""
    while b"\r\n\r\n" not in got:
        data = peer.recv(65536)
        assert data, f"the server closed after {got!r}"
        got += data
    head, _, body = got.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head.lower())
    while len(body) < (int(found[1]) if found else 0):
        body += peer.recv(65536)
    close = re.search(rb"\r\nconnection: (\w+)", head.lower())
    return statuses(head)[0], close[1].decode() if close else "", json.loads(body or "null")


def contents(daemon: Daemon) -> list[str]:
    with sqlite3.connect(daemon.directory / "chatd.db") as database:
        found = [row[0] for row in database.execute("SELECT content FROM chat_messages ORDER BY id")]
    database.close()
    return found


# How clients end a connection, and what they send besides requests.


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"\r\n\r\n", b"\n", b"GET / HTTP/1.1\r\n\r\n"])
def test_what_follows_the_last_request_does_not_spoil_its_answer(daemon: Daemon, behind: bytes) -> None:
    with talk(daemon) as peer:
        peer.sendall(post("x", Connection="close") + behind)
        assert statuses(rest(peer)) == [200]


def test_a_line_break_between_requests_is_skipped(daemon: Daemon) -> None:
    with talk(daemon) as peer:
        for behind in (b"\r\n", b"\n", b"\r\n\r\n", b""):
            peer.sendall(post("x") + behind)
            assert answer(peer)[0] == 200
        peer.sendall(b"\r")
        peer.sendall(b"\n" + post("x") + b"\r\n" + post("x", Connection="close"))
        assert statuses(rest(peer)) == [200, 200]


def test_a_client_that_closes_its_sending_side_is_answered(daemon: Daemon) -> None:
    """On the fast route and on Quart's, also when its request takes long."""
    with sqlite3.connect(daemon.directory / "chatd.db", isolation_level=None) as lock, talk(daemon) as peer:
        lock.execute("BEGIN IMMEDIATE")
        peer.sendall(post("x"))
        peer.shutdown(socket.SHUT_WR)
        with talk(daemon) as other:
            other.sendall(
                f"PUT /api/ws/conversations/1/members/9 HTTP/1.1\r\nHost: x\r\nX-Internal-Token: {TOKEN}\r\n"
                "Content-Length: 2\r\n\r\n{}".encode()
            )
            other.shutdown(socket.SHUT_WR)
            time.sleep(0.3)  # both wait for the writer
            lock.execute("COMMIT")
            assert statuses(rest(peer)) == [200]
            assert statuses(rest(other)) == [200]
    lock.close()


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    with talk(daemon) as peer:
        peer.sendall(b"".join(post(f"m{n}", conversation=77) for n in range(20)))
        peer.shutdown(socket.SHUT_WR)
        got = rest(peer)
    assert statuses(got) == [200] * 20
    assert [int(seq) for seq in re.findall(rb'"seq":(\d+)', got)] == list(range(1, 21))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_that_the_client_does_not_keep_is_closed(daemon: Daemon, version: str) -> None:
    headers = {} if version == "1.0" else {"Connection": "close"}
    with talk(daemon) as peer:
        peer.sendall(post("x", version=version, **headers))
        began = time.monotonic()
        assert statuses(rest(peer)) == [200]
        assert time.monotonic() - began < 1, "the server waited for the client"


def test_go_on_is_said_to_those_whose_body_is_wanted(daemon: Daemon) -> None:
    with talk(daemon) as peer:
        whole = post("x", Expect="100-continue", Connection="close")
        head = post("x", Expect="100-continue", Connection="close", body=False)
        peer.sendall(head)
        assert peer.recv(4096).startswith(b"HTTP/1.1 100")
        peer.sendall(whole[len(head) :])
        assert statuses(rest(peer)) == [200]
    for refused in ({"Content-Length": "5000000"}, {"X-Internal-Token": "wrong"}):
        with talk(daemon) as peer:
            peer.sendall(post("x", body=False, Expect="100-continue", **refused))
            assert statuses(rest(peer)) in ([413], [401])


def test_two_idempotency_keys_are_refused(daemon: Daemon) -> None:
    """Whoever takes one of them for the key may be wrong."""
    for keys in ("Idempotency-Key: a\r\nidempotency-key: b", "Idempotency-Key: a\r\nIdempotency-Key: a"):
        with talk(daemon) as peer:
            peer.sendall(post("x", conversation=78).replace(b"\r\n", f"\r\n{keys}\r\n".encode(), 1))
            status, _, body = answer(peer)
            assert (status, body["code"], list(body["errors"])) == (422, "bad_request", ["Idempotency-Key"])
    assert daemon.get("/api/ws/conversations/78/messages").json["messages"] == []


def test_a_body_that_is_too_large_costs_no_connection(daemon: Daemon) -> None:
    """A client that uses a connection again may have sent the next request before it learns of the end."""
    with talk(daemon) as peer:
        for number in range(3):
            peer.sendall(post("x", conversation=79))
            assert answer(peer)[0] == 200
            path = ("/api/ws/messages", "/api/ws/tokens", "/api/ws/messages/batch/")[number]
            large = b"x" * (300_000 if number < 2 else 1)
            peer.sendall(
                b"POST %b HTTP/1.1\r\nHost: x\r\nX-Internal-Token: %b\r\n" % (path.encode(), TOKEN.encode())
            )
            peer.sendall(b"Content-Length: %d\r\n\r\n" % len(large))
            for start in range(0, len(large), 50_000):
                peer.sendall(large[start : start + 50_000])
                time.sleep(0.01)
            status, connection, body = answer(peer)
            assert (status, connection) == (413 if number < 2 else 400, ""), body


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/batch"])
def test_a_body_in_an_encoding_is_refused_by_the_name_of_it(daemon: Daemon, path: str) -> None:
    """RFC 9110 §8.4; to call it no JSON would send people looking in the wrong place."""
    for encoding, expected in (("gzip", 415), ("identity", 200)):
        request = post("x", conversation=79).replace(MESSAGES.encode(), path.encode(), 1)
        with talk(daemon) as peer:
            peer.sendall(request.replace(b"\r\n", f"\r\nContent-Encoding: {encoding}\r\n".encode(), 1))
            status, _, body = answer(peer)
            if expected == 415:
                assert (status, body["code"], encoding in body["message"]) == (415, "bad_request", True)
            else:
                assert status in (200, 422)


def test_a_refusal_is_read_although_the_body_still_comes(daemon: Daemon) -> None:
    """To close with bytes unread would reset the connection and take the answer with it."""
    with talk(daemon) as peer:
        peer.sendall(post("x", Content_Length="3000000", body=False) + b"x" * 100_000)
        time.sleep(0.1)
        peer.sendall(b"x" * 100_000)
        assert answer(peer)[:2] == (413, "close")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000, 431),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"POST /api/ws/messages HTTP/1.1\r\nHost: x\r\nX-Internal-Token: %s\r\n" % TOKEN.encode()
         + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /api/ws/messages/batch HTTP/1.1\r\nHost: x\r\nX-Internal-Token: %s\r\n" % TOKEN.encode()
         + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_http_is_told_so(daemon: Daemon, words: bytes, status: int) -> None:
    with talk(daemon) as peer:
        peer.sendall(words)
        got = answer(peer)
        assert got[:2] == (status, "close")
        assert got[2]["code"] == "bad_request"
        assert peer.recv(1) == b""


def test_a_body_that_breaks_off_harms_nobody(daemon: Daemon) -> None:
    for path in (MESSAGES, f"{MESSAGES}/batch"):
        with talk(daemon) as peer:
            peer.sendall(post("x")[:-5].replace(MESSAGES.encode(), path.encode(), 1))
            peer.shutdown(socket.SHUT_WR)
            assert statuses(rest(peer)) == [400]


# The same moment: a timer ends, and a request arrives. On sockets in one task, so that it is the same.


async def _hello(scope: Any, receive: Any, send: Any, *_: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@asynccontextmanager
async def served(
    app: Any = _hello, lobby: Lobby | None = None, is_token: Callable[[Any], bool] = lambda _: False
) -> AsyncIterator[tuple[socket.socket, Leave, trio.Event]]:
    """A client's socket, and what ends the connection behind it."""
    leaving = trio.Event()
    settings = HypercornConfig()
    settings.leave, settings.lobby = Leave(leaving), Lobby("api", 100) if lobby is None else lobby
    settings.strangers, settings.is_token = Strangers(), is_token
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_listeners, partial(Connection, app, settings, None, None), [listener])
        nursery.start_soon(serve)
        with socket.create_connection(listener.socket.getsockname()[:2], timeout=PATIENCE) as peer:
            yield peer, settings.leave, leaving
            nursery.cancel_scope.cancel()


async def everything(peer: socket.socket) -> bytes:
    with trio.fail_after(PATIENCE):
        return await trio.to_thread.run_sync(rest, peer)


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize("request_first", [False, True])
async def test_a_request_in_the_moment_of_the_stop(served_before: bool, request_first: bool) -> None:
    async with served() as (peer, leave, leaving):
        if served_before:
            peer.sendall(GET)
            await trio.to_thread.run_sync(peer.recv, 4096)
        await settled()
        leaving.set()
        if request_first:
            peer.sendall(GET)
        leave.at_once()
        if not request_first:
            peer.sendall(GET)
        got = await everything(peer)
    assert statuses(got) == [200]
    assert b"connection: close" in got.lower()


async def test_a_request_in_the_moment_in_which_the_keep_alive_time_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.2)
    async with served(is_token=lambda _: True) as (peer, _, _):
        peer.sendall(GET)
        assert statuses(await trio.to_thread.run_sync(peer.recv, 4096)) == [200]
        await settled()
        time.sleep(0.3)  # noqa: ASYNC251  # the loop wakes, and finds both
        peer.sendall(GET)
        assert statuses(await everything(peer)) == [200], "and then the time is over"


async def test_an_idle_connection_ends_with_the_stop() -> None:
    async with served() as (peer, leave, _):
        peer.sendall(GET)
        assert statuses(await trio.to_thread.run_sync(peer.recv, 4096)) == [200]
        await settled()
        leave.at_once()
        assert await everything(peer) == b""


@pytest.mark.parametrize("part", [GET[:10], b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1234"])
async def test_a_request_that_is_still_coming_at_the_stop(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for; then the client is told that it was not taken."""
    monkeypatch.setattr(connection, "LAST_REQUEST", 0.3)
    for missing, status in ((GET[10:] if part in GET else b"56789", 200), (b"", 503)):
        async with served() as (peer, leave, leaving):
            peer.sendall(part)
            await settled()
            leaving.set()
            leave.at_once()
            await trio.sleep(0.05)
            peer.sendall(missing)
            got = await everything(peer)
            assert statuses(got) == [status]
            assert b"connection: close" in got.lower()


async def test_a_slow_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    async with served() as (peer, _, _):
        peer.sendall(GET[:10])
        assert statuses(await everything(peer)) == [408]


@pytest.mark.parametrize("known", [True, False])
async def test_who_has_not_shown_the_token_counts_as_unknown_until_it_has_gone(known: bool) -> None:
    """Also while it is answered, when nobody else ends it."""
    lobby, working, go_on = Lobby("api", 100), trio.Event(), trio.Event()

    async def slow(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        working.set()
        await go_on.wait()
        await _hello(scope, receive, send)

    async with served(slow, lobby, lambda tokens: known and tokens == [b"t"]) as (peer, _, _):
        peer.sendall(GET.replace(b"Host", b"X-Internal-Token: t\r\nHost"))
        await working.wait()
        assert len(lobby) == (not known)
        assert not lobby.make_room(hurry=True)
        go_on.set()
        assert statuses(await trio.to_thread.run_sync(peer.recv, 4096)) == [200]
        await settled()
        assert len(lobby) == (not known)
        peer.close()
        await settled()
        assert len(lobby) == 0


async def test_strangers_are_answered_in_their_order_and_so_many_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    strangers = Strangers()
    answered: list[tuple[int, float]] = []

    async def ask(number: int) -> None:
        await strangers.turn()
        answered.append((number, trio.current_time()))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(int(BURST + 2 * RATE)):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
    assert [number for number, _ in answered] == list(range(int(BURST + 2 * RATE)))
    assert answered[int(BURST) - 1][1] == began, "at once as long as there are few"
    assert answered[-1][1] - began == pytest.approx(2, abs=0.1)


async def test_pipelined_requests_at_the_stop() -> None:
    """The one in hand is answered, and says that the others were not taken."""
    go_on = trio.Event()

    async def slow(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        await go_on.wait()
        await _hello(scope, receive, send)

    async with served(slow) as (peer, leave, leaving):
        peer.sendall(3 * GET)
        await settled()
        leaving.set()
        leave.at_once()
        go_on.set()
        got = await everything(peer)
    assert statuses(got) == [200]
    assert b"connection: close" in got.lower()


async def test_an_application_that_fails_is_an_incident() -> None:
    async def bad(*_: Any) -> None:
        raise ZeroDivisionError

    async with served(bad) as (peer, _, _):
        peer.sendall(GET.replace(b"Host", b"Connection: close\r\nHost"))
        got = await everything(peer)
    assert statuses(got) == [500]
    assert b'"incident"' in got


# The whole daemon.


def test_every_answer_of_a_drain_says_that_the_connection_ends(daemons: Daemons) -> None:
    daemon = daemons(server__drain_window=2)
    with talk(daemon) as peer, talk(daemon) as keeper, _somebody_connected(daemon):
        peer.sendall(post("before"))
        assert answer(peer)[:2] == (200, "")
        daemon.signal(signal.SIGTERM)
        _until(lambda: daemon.get("/readyz").status == 503)
        for one, request in ((peer, post("x")), (keeper, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")):
            one.sendall(request)
            assert answer(one)[:2] == (200, "close")
            assert one.recv(1) == b""
    assert daemon.wait() == 0


@contextmanager
def _somebody_connected(daemon: Daemon) -> Iterator[None]:
    """Nobody's drain takes no time."""
    with socket.create_connection(("127.0.0.1", daemon.hub_port)) as peer:
        peer.sendall(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert peer.recv(4096)
        yield


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


def test_what_is_stored_at_a_stop_is_answered(daemons: Daemons) -> None:
    """Many backends post without a pause over kept connections, and never look at a header."""
    daemon = daemons(server__drain_window=0)
    answered: set[str] = set()

    def backend(number: int) -> None:
        with talk(daemon) as peer:
            try:
                for count in range(10**6):
                    peer.sendall(post(f"{number}-{count}"))
                    if answer(peer)[0] == 200:
                        answered.add(f"{number}-{count}")
            except (OSError, AssertionError):
                return

    threads = [threading.Thread(target=backend, args=(number,)) for number in range(40)]
    for one in threads:
        one.start()
    _until(lambda: len(answered) > 200)
    assert daemon.stop() == 0
    for one in threads:
        one.join()
    assert set(contents(daemon)) == answered


@pytest.mark.parametrize("held", [1.0, 6.5])
def test_what_the_last_flush_commits_is_answered(daemons: Daemons, held: float) -> None:
    """The database is slow at the stop: faster or slower than requests in progress are waited for."""
    daemon = daemons(server__drain_window=0)
    with sqlite3.connect(daemon.directory / "chatd.db", isolation_level=None) as lock, talk(daemon) as peer:
        lock.execute("BEGIN IMMEDIATE")
        peer.sendall(post("x"))
        time.sleep(0.1)
        daemon.signal(signal.SIGTERM)
        time.sleep(held)
        lock.execute("COMMIT")
        got = answer(peer)
    lock.close()
    assert daemon.wait() == 0
    assert (got[0], contents(daemon)) in ((200, ["x"]), (503, []))
