"""A thousand clients in one epoll loop that costs less than what it listens to.

Every byte is compared with what should come: each message at each client, once, in order, or it fails.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from io import BufferedReader

from chatd.protocol import event

CONNECT_SECONDS = 10.0
BUFFER_BYTES = 256 * 1024
MASK = bytes(4)  # a client must mask what it sends; zeros change nothing

_REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Failure(Exception):
    """Something did not arrive, or something else did."""


class Audience:
    """Connected clients. `with Audience(…) as audience:` closes them."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._receive: dict[int, Callable[[bytearray], int]] = {}
        self._ready = select.epoll()
        self._buffer = bytearray(BUFFER_BYTES)

    def __enter__(self) -> Audience:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            one.close()
        self._ready.close()

    def connect(self, port: int, room: int, token: str | None) -> None:
        """One more client; with a token it signs in and enters the room."""
        one = socket.create_connection(("127.0.0.1", port), CONNECT_SECONDS)
        self._sockets.append(one)
        with one.makefile("rb") as replies:
            one.sendall(_REQUEST)
            _upgraded(replies)
            if token is not None:
                one.sendall(_masked(event("auth", token=token, rooms={room: None})))
                _entered(replies, room)
        one.setblocking(False)
        self._receive[one.fileno()] = one.recv_into
        self._ready.register(one, select.EPOLLIN)

    def hear(self, expected: bytes, seconds: float) -> None:
        """Read until everybody has exactly these bytes, for so long at most. Raises Failure."""
        positions = dict.fromkeys(self._receive, 0)
        receive, buffer, view = self._receive, self._buffer, memoryview(self._buffer)
        missing, deadline = len(positions), time.monotonic() + seconds
        while missing:
            ready = self._ready.poll(max(0.0, deadline - time.monotonic()))
            if not ready:
                got = sum(positions.values()) / (len(expected) * len(positions))
                raise Failure(f"after {seconds:.0f} s {missing} clients lack something; {got:.1%} of it came")
            for descriptor, _ in ready:
                size = receive[descriptor](buffer)
                start = positions[descriptor]
                if not size or not expected.startswith(view[:size], start):
                    raise Failure(f"a client got {bytes(view[: min(size, 200)])!r} at byte {start}")
                positions[descriptor] = start + size
                if start + size == len(expected):
                    missing -= 1


def _upgraded(replies: BufferedReader) -> None:
    status = replies.readline()
    if not status.startswith(b"HTTP/1.1 101 "):
        raise Failure(f"the handshake was answered with {status!r}")
    while replies.readline().strip():
        pass


def _entered(replies: BufferedReader, room: int) -> None:
    """`hello`, then `ready` with the room in it."""
    found = [_next_text(replies), _next_text(replies)]
    if not found[1].startswith(b'{"event":"ready"') or b'"rooms":{"%d":' % room not in found[1]:
        raise Failure(f"a client was not let in: {found}")


def _next_text(replies: BufferedReader) -> bytes:
    first, size = replies.read(2) or (0, 0)
    if first != 0x81 or size > 126:
        raise Failure(f"a client was not let in: a frame begins with {first:#x} {size:#x}")
    return replies.read(int.from_bytes(replies.read(2), "big") if size == 126 else size)


def _masked(text: bytes) -> bytes:
    size = len(text).to_bytes(2, "big")
    head = b"\x81\xfe" + size if len(text) > 125 else b"\x81" + bytes([0x80 | len(text)])
    return head + MASK + text
