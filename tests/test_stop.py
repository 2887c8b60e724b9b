"""How it ends: SIGTERM is a protocol, not a cut, and has a deadline whatever the clients do."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from chatd.hub.server import DRAIN_RATE, window_for
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon

SLACK = 3.0  # seconds of ours on top of every deadline, for a busy machine


async def test_sigterm_sends_everybody_away_over_the_window(daemons: Daemons) -> None:
    window, clients = 1.0, 20
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=window))
    ends: list[float] = []

    async def stay(user_id: int, *, task_status: trio.TaskStatus[None]) -> None:
        async with login(daemon, user_id) as client:
            task_status.started()
            assert (await client.closed(window + SLACK))[0] == 1012
            ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for user_id in range(1, clients + 1):
            await nursery.start(partial(stay, user_id))
        started = trio.current_time()
        assert await trio.to_thread.run_sync(daemon.stop) == 0
        assert trio.current_time() - started < window + SLACK
    assert len(ends) == clients
    assert max(ends) - min(ends) > window / 4, "all at once: they would all come back at once"


async def test_a_second_signal_ends_a_long_goodbye(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=300))
    async with login(daemon, 1), login(daemon, 2), login(daemon, 3):
        daemon.signal(signal.SIGTERM)
        await trio.sleep(0.1)
        daemon.signal(signal.SIGTERM)  # shells signal a process and then its group: this is still the first
        await trio.sleep(0.6)  # and this is not
        assert runs(daemon), "it ended by itself"
        daemon.signal(signal.SIGTERM)
        with trio.fail_after(SLACK):
            assert await trio.to_thread.run_sync(daemon.wait) == 1


def runs(daemon: Daemon) -> bool:
    return bool(Path(f"/proc/{daemon.pid}/cmdline").read_bytes())  # empty once it has ended


async def test_a_stopping_daemon_says_so_first_and_serves_on_until_it_ends(daemons: Daemons) -> None:
    """/readyz for the proxy, `reconnect` for the clients; posts are taken and delivered as long as it lives."""
    window = 2.0
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=window))
    async with login(daemon, 1, {"1": None}) as ada, login(daemon, 2, {"1": None}) as grace:
        daemon.signal(signal.SIGTERM)
        for client in (ada, grace):
            asked = await client.expect("reconnect", patience=1)
            assert asked == {
                "event": "reconnect",
                "reason": "restart",
                "delay": [0, 1000],
                "deadline_ms": 2000,
            }
        answer = await trio.to_thread.run_sync(daemon.get, "/readyz")
        assert (answer.status, answer.json["status"]) == (503, "stopping")
        stored = await trio.to_thread.run_sync(daemon.post, 1, 9, "at the last moment")
        async with trio.open_nursery() as nursery:
            for client in (ada, grace):
                nursery.start_soon(partial(_is_sent_away, client, window + SLACK))
        assert await trio.to_thread.run_sync(daemon.wait) == 0
    await trio.to_thread.run_sync(daemon.start)
    async with login(daemon, 1, {"1": 0}) as ada:
        changes = ada.ready["rooms"]["1"]["changes"]  # type: ignore[attr-defined]
        assert [(c["id"], c["content"]) for c in changes] == [(stored["id"], "at the last moment")]


async def _is_sent_away(client: Any, patience: float) -> None:
    assert (await client.closed(patience))[0] == 1012


async def test_what_was_posted_is_flushed_before_the_end(daemons: Daemons) -> None:
    """A batch that is on its way when the signal comes is answered, and is there after."""
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=0))
    messages = [{"conversation_id": 1, "sender_id": 9, "content": f"m{n}"} for n in range(1000)]
    answers = []

    async def send() -> None:
        body = {"messages": messages}
        answers.append(await trio.to_thread.run_sync(daemon.request, "POST", "/api/ws/messages/batch", body))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(0.03)
        daemon.signal(signal.SIGTERM)
    assert await trio.to_thread.run_sync(daemon.wait) == 0
    assert [result["seq"] for result in answers[0].json["results"]] == list(range(1, 1001))
    await trio.to_thread.run_sync(daemon.start)
    page = await trio.to_thread.run_sync(daemon.get, "/api/ws/conversations/1/messages?limit=1")
    assert page.json["messages"][0]["content"] == "m999"


async def test_commands_at_the_writer_are_answered_before_the_goodbye(daemons: Daemons) -> None:
    """Also receipts, which wait for each other at first."""
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=0.2))
    stored = await trio.to_thread.run_sync(daemon.post, 1, 9, "before")
    lock = sqlite3.connect(daemon.directory / "chatd.db", isolation_level=None)
    async with login(daemon, 1, {"1": None}) as ada:
        lock.execute("BEGIN IMMEDIATE")
        for ref in range(101, 111):
            await ada.send("send", ref=ref, conversation_id=1, content=f"m{ref}")
        for ref in (201, 202):
            await ada.send("read", ref=ref, conversation_id=1, id=stored["id"])
        await ada.send("ping", ref=300)
        await ada.expect("pong")  # it has taken all of them
        daemon.signal(signal.SIGTERM)
        await ada.expect("reconnect")
        await trio.sleep(0.6)  # the window is over
        lock.execute("COMMIT")
        assert (await ada.closed(SLACK))[0] == 1012
    lock.close()
    assert await trio.to_thread.run_sync(daemon.wait) == 0
    refs = {event["ref"] for event in ada.received if event["event"] == "ok"}
    assert refs == {*range(101, 111), 201, 202}


@contextmanager
def deaf_client(daemon: Daemon, user_id: int, conversation_id: int) -> Iterator[socket.socket]:
    """A client in a room that never reads what it is sent, with buffers of a few KiB."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", daemon.hub_port))
    try:
        deaf.sendall(
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        _read_until(deaf, b'"hello"')
        auth = {"event": "auth", "token": daemon.token_for(user_id), "rooms": {str(conversation_id): None}}
        text = json.dumps(auth).encode()
        deaf.sendall(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)
        _read_until(deaf, b'"ready"')  # and never again
        yield deaf
    finally:
        deaf.close()


def _read_until(peer: socket.socket, wanted: bytes) -> None:
    got = b""
    while wanted not in got:
        got += peer.recv(4096)


async def test_clients_that_never_read_do_not_hold_up_the_end(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, server__drain_window=0.5))
    with deaf_client(daemon, 1, 1), deaf_client(daemon, 2, 1), deaf_client(daemon, 3, 1):
        async with login(daemon, 4, {"1": None}) as grace:
            for number in range(8):  # 640 KB: more than the kernel takes, less than an outbox
                messages = [{"conversation_id": 1, "sender_id": 9, "content": "x" * 8000}] * 10
                body = {"messages": messages}
                await trio.to_thread.run_sync(daemon.request, "POST", "/api/ws/messages/batch", body)
                assert (await grace.messages(10))[-1]["seq"] == 10 * (number + 1)
            assert connections(daemon) == 4
            started = trio.current_time()
            assert await trio.to_thread.run_sync(daemon.stop) == 0
            assert trio.current_time() - started < 0.5 + 2.0 + SLACK


def connections(daemon: Daemon) -> int:
    lines = daemon.get("/metrics").body.decode().splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("chatd_connections{"))


def test_very_many_are_sent_away_over_a_longer_window() -> None:
    assert window_for(100, 5.0) == 5.0
    assert window_for(50_000, 5.0) / 2 == 50_000 / DRAIN_RATE == 10
