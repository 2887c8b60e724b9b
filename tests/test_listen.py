"""Sockets that somebody else has opened: taken where they are meant for chatd, or refused in a sentence."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from chatd.config import Api, Config, Hub
from chatd.core.errors import OperatorError
from chatd.daemon import systemd
from chatd.daemon.listen import USER_TIMEOUT, open_sockets
from chatd.net import gate
from chatd.net.gate import IN_A_ROW, Gate
from tests.client import connect
from tests.daemon import Daemon

CONFIG = Config(api=Api(bind="127.0.0.1:0"), hub=Hub(bind="127.0.0.1:0"))


def listening(address: str = "127.0.0.1") -> socket.socket:
    """On a port of the kernel's choice; blocking, and inherited by children, as systemd's are."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.bind((address, 0))
    opened.listen()
    opened.set_inheritable(True)
    return opened


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


Ports = tuple[int, list[int]]


def taken(monkeypatch: pytest.MonkeyPatch, closing: ExitStack, *given: tuple[str, socket.socket]) -> Ports:
    """The port of the API and those of the hub. What was given is open no more."""
    handed_over = [(name, one.detach()) for name, one in given]
    monkeypatch.setattr(systemd, "handed_over", lambda: handed_over)
    try:
        api, hub = open_sockets(CONFIG)
    except OperatorError:
        for _, descriptor in handed_over:
            with suppress(OSError):  # it was taken, and closed
                os.close(descriptor)
        raise
    for one in (api, *hub):
        closing.enter_context(one)
        assert not one.getblocking()
        assert not one.get_inheritable()
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT
    return port(api), [port(one) for one in hub]


def port(one: socket.socket) -> int:
    return int(one.getsockname()[1])


@pytest.mark.parametrize(
    "names",
    [("api", "hub"), ("hub", "api"), ("chatd-api.socket", "chatd.socket"), ("unknown", "unknown"), ("", "")],
)
def test_names_or_order_tell_which_is_which(
    monkeypatch: pytest.MonkeyPatch, closing: ExitStack, names: tuple[str, str]
) -> None:
    first, second = listening(), listening()
    ports = port(first), port(second)
    api, hub = taken(monkeypatch, closing, (names[0], first), (names[1], second))
    assert (api, hub) == ((ports[1], [ports[0]]) if names[0] == "hub" else (ports[0], [ports[1]]))


def test_the_hub_may_have_several_and_what_is_not_given_is_bound(
    monkeypatch: pytest.MonkeyPatch, closing: ExitStack
) -> None:
    first, second = listening(), listening("::1")
    ports = [port(first), port(second)]
    api, hub = taken(monkeypatch, closing, ("hub", first), ("hub", second))
    assert hub == ports
    assert api not in ports


def test_the_only_one_is_for_the_clients(monkeypatch: pytest.MonkeyPatch, closing: ExitStack) -> None:
    one = listening()
    wanted = port(one)
    assert taken(monkeypatch, closing, ("unknown", one))[1] == [wanted]


def connected() -> socket.socket:
    with listening() as server:
        return socket.create_connection(server.getsockname())


@pytest.mark.parametrize(
    "given",
    [
        partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM),
        partial(socket.socket, socket.AF_UNIX, socket.SOCK_STREAM),
        partial(socket.socket, socket.AF_INET, socket.SOCK_STREAM),  # nobody has called listen()
        connected,
    ],
)
def test_what_nobody_can_connect_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, closing: ExitStack, given: partial[socket.socket]
) -> None:
    with pytest.raises(OperatorError, match="`hub` is not a listening TCP socket"):
        taken(monkeypatch, closing, ("hub", given()))


def test_what_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(systemd, "handed_over", lambda: [("api", descriptor)])
    with pytest.raises(OperatorError, match="`api` is not a listening TCP socket"):
        open_sockets(CONFIG)
    os.close(descriptor)


def test_names_that_mean_nothing_here_are_refused(monkeypatch: pytest.MonkeyPatch, closing: ExitStack) -> None:
    with pytest.raises(OperatorError, match="'ws'"):
        taken(monkeypatch, closing, ("ws", listening()))
    with pytest.raises(OperatorError, match="Two sockets are handed over as `api`"):
        taken(monkeypatch, closing, ("api", listening()), ("api", listening()))
    with pytest.raises(OperatorError, match="'unknown'"):
        taken(monkeypatch, closing, *(("unknown", listening()) for _ in range(3)))


# Several processes that accept from one socket.


@pytest.mark.service
async def test_the_worker_with_few_clients_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their pauses it is chance, or the order in which the kernel wakes them."""
    monkeypatch.setattr(gate, "SHARED", True)
    with listening() as one:
        one.setblocking(False)
        counts = {"few": 0, "many": 0}

        async def accept(name: str, clients: int) -> None:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(one.dup()))
            async with Gate(listener, trio.Semaphore(100), lambda: clients) as limited:
                while True:
                    async with await limited.accept() as stream:
                        counts[name] += 1
                        await stream.send_all(b"!")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, "few", 0)
            nursery.start_soon(accept, "many", 5000)
            for _ in range(50):
                async with await trio.open_tcp_stream("127.0.0.1", port(one)) as client:
                    assert await client.receive_some() == b"!"
            nursery.cancel_scope.cancel()
    assert counts["few"] >= 38, counts


async def test_a_crowd_is_taken_without_a_pause_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SHARED", True)
    monkeypatch.setattr(gate, "PAUSE_LEAST", 1.0)
    monkeypatch.setattr(gate, "PAUSE_MOST", 1.0)
    with listening() as one:
        one.setblocking(False)
        async with Gate(
            trio.SocketListener(trio.socket.from_stdlib_socket(one.dup())), trio.Semaphore(100)
        ) as limited:
            with ExitStack() as clients:
                for _ in range(IN_A_ROW):
                    clients.enter_context(socket.create_connection(one.getsockname()))
                await (await limited.accept()).aclose()  # it pauses for the first, up to a second
                started = trio.current_time()
                for _ in range(IN_A_ROW - 1):
                    await (await limited.accept()).aclose()
                assert trio.current_time() - started < 0.5
                with trio.move_on_after(0.1):
                    await limited.accept()
                    raise AssertionError("nobody waits")


# A whole chatd.


class Activated(Daemon):
    """Started by a shell that does what systemd does: the sockets become 3, 4 …; `pid` is whose they are."""

    def __init__(self, directory: Path, names: str, *given: socket.socket, pid: str = "$$") -> None:
        super().__init__(directory)
        # Well away from 3, so that none is overwritten before it was moved.
        self._inherited = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in given]
        moves = " ".join(f"{number}<&{fd} {fd}<&-" for number, fd in enumerate(self._inherited, 3))
        script = f'exec {moves}; export LISTEN_PID={pid} LISTEN_FDS={len(given)}; exec "$@"'
        self._prefix = ["bash", "-c", script, "bash"]
        self.environ["LISTEN_FDNAMES"] = names

    def start(self) -> Daemon:
        try:
            return super().start()
        finally:
            for descriptor in self._inherited:
                os.close(descriptor)


@pytest.mark.service
async def test_a_chatd_serves_on_what_it_is_handed(tmp_path: Path) -> None:
    with listening() as api, listening() as hub, listening("::1") as other:
        daemon = Activated(tmp_path, "api:hub:hub", api, hub, other)
        own = [daemon.api_port, daemon.hub_port]
        daemon.url = f"http://127.0.0.1:{port(api)}"
        urls = [f"ws://127.0.0.1:{port(hub)}/ws", f"ws://[::1]:{port(other)}/ws"]
        await trio.to_thread.run_sync(daemon.start)
    try:
        for url in urls:
            async with connect(url) as client:
                assert (await client.next())["event"] == "hello"
        for unused in own:
            with pytest.raises(OSError, match="all attempts to connect"):
                await trio.open_tcp_stream("127.0.0.1", unused)
        assert await trio.to_thread.run_sync(daemon.stop) == 0
    finally:
        daemon.close()


@pytest.mark.service
async def test_a_chatd_leaves_alone_what_is_for_another(tmp_path: Path) -> None:
    with listening() as hub:
        daemon = Activated(tmp_path, "hub", hub, pid="1")
        await trio.to_thread.run_sync(daemon.start)
    try:
        async with connect(daemon.ws_url) as client:
            assert (await client.next())["event"] == "hello"
    finally:
        daemon.close()


@pytest.mark.service
def test_what_cannot_be_taken_is_said_in_a_sentence(tmp_path: Path) -> None:
    with listening() as hub:
        daemon = Activated(tmp_path, "ws", hub)
        with pytest.raises(AssertionError, match=r"(?s)chatd ended with 1:.*A socket is handed over as 'ws'"):
            daemon.start()
