"""An error in a library, or of our own, ends the connection that it belongs to, and no other.

The errors are planted: a daemon whose libraries raise one where a client asks for it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.client import Client, login
from tests.daemon import Daemon

pytestmark = pytest.mark.service
PATIENCE = 10  # seconds


class Faulty(Daemon):
    """`X-Plant` in a handshake or a request, or the text "plant" in a frame, and the library fails."""

    planted = """
import h11, wsproto
from chatd.cli import main
from wsproto.connection import Connection
from wsproto.handshake import H11Handshake

def failing(take, sign):
    def took(self, data):
        if data and sign in data:
            raise RuntimeError("planted")
        return take(self, data)
    return took

H11Handshake.receive_data = failing(H11Handshake.receive_data, b"X-Plant")
Connection.receive_data = failing(Connection.receive_data, b"plant")
h11.Connection.receive_data = failing(h11.Connection.receive_data, b"X-Plant: here")
main()
"""

    def program(self) -> list[str]:
        return [sys.executable, "-c", self.planted]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    daemon = Faulty(tmp_path_factory.mktemp("faulty"))
    try:
        daemon.start()
        yield daemon
        assert daemon.stop() == 0
    finally:
        daemon.close()


@pytest.fixture
async def bystander(faulty: Faulty) -> AsyncIterator[Client]:
    """Somebody in a room, who gets the next message whatever happens to others."""
    async with login(faulty, 1, {"1": None}) as client:
        yield client
        await trio.to_thread.run_sync(faulty.post, 1, 2, "still here?")
        with trio.fail_after(PATIENCE):
            while (event := await client.next())["event"] != "message":
                pass
        assert event["content"] == "still here?"


def ends(port: int, *words: bytes) -> bool:
    """Whether the daemon closes a connection on which somebody says this."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as peer:
        for one in words:
            peer.sendall(one)
            if b"101 " not in (peer.recv(65536) or b"101 "):
                return True
        while peer.recv(65536):
            pass
    return True


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


async def test_an_error_in_a_handshake(faulty: Faulty, bystander: Client) -> None:
    request = UPGRADE + b"X-Plant: here\r\n\r\n"
    assert await trio.to_thread.run_sync(ends, faulty.hub_port, request)
    assert "planted" in faulty.log


async def test_an_error_in_a_frame(faulty: Faulty, bystander: Client) -> None:
    """In the reader, which is a task of trio-websocket's."""
    frame = b"\x81\x85" + bytes(4) + b"plant"
    assert await trio.to_thread.run_sync(ends, faulty.hub_port, UPGRADE + b"\r\n", frame)


async def test_an_error_in_an_http_request(faulty: Faulty, bystander: Client) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Plant: here\r\n\r\n"
    assert await trio.to_thread.run_sync(ends, faulty.api_port, request)
