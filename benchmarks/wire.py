"""A chatd client's first words, over a blocking socket: the upgrade, the login, one room."""

from __future__ import annotations

import socket
from io import BufferedReader

from benchmarks.audience import Failure
from chatd.core.protocol import event

MASK = bytes(4)  # a client must mask what it sends; zeros change nothing

_REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def upgrade(one: socket.socket) -> None:
    with one.makefile("rb") as replies:
        one.sendall(_REQUEST)
        _upgraded(replies)


def log_in(one: socket.socket, room: int, token: str) -> None:
    with one.makefile("rb") as replies:
        one.sendall(_REQUEST)
        _upgraded(replies)
        one.sendall(masked(event("auth", token=token, rooms={room: None})))
        _entered(replies, room)


def _upgraded(replies: BufferedReader) -> None:
    status = replies.readline()
    if not status.startswith(b"HTTP/1.1 101 "):
        raise Failure(f"the handshake was answered with {status!r}")
    while replies.readline().strip():
        pass


def _entered(replies: BufferedReader, room: int) -> None:
    """`hello`, then `ready` with the room in it."""
    found = [next_text(replies), next_text(replies)]
    if not found[1].startswith(b'{"event":"ready"') or b'"rooms":{"%d":' % room not in found[1]:
        raise Failure(f"a client was not let in: {found}")


def next_text(replies: BufferedReader) -> bytes:
    """The text of the next frame, of less than 64 KiB. Raises Failure for another one."""
    first, size = replies.read(2) or (0, 0)
    if first != 0x81 or size > 126:
        raise Failure(f"a text frame was expected, and one began with {first:#x} {size:#x}")
    return replies.read(int.from_bytes(replies.read(2), "big") if size == 126 else size)


def masked(text: bytes) -> bytes:
    size = len(text).to_bytes(2, "big")
    head = b"\x81\xfe" + size if len(text) > 125 else b"\x81" + bytes([0x80 | len(text)])
    return head + MASK + text
