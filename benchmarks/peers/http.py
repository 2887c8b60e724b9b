"""A WebSocket client's words over a blocking socket: the upgrade, and frames. It trusts its server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.audience import Failure
from benchmarks.wire import masked
from chatd.core.protocol import text_frame

Enter = Callable[["Line"], None]


class Line:
    """What has come and was not taken yet stays in a buffer: `finish` says that it must be empty."""

    def __init__(self, one: socket.socket) -> None:
        self._socket = one
        self._buffer = b""

    def upgrade(self, path: str) -> None:
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = self.until(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise Failure(f"the handshake was answered with {head[:80]!r}")

    def send(self, text: bytes) -> None:
        self._socket.sendall(masked(text))

    def until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._more()
        found, _, self._buffer = self._buffer.partition(end)
        return found + end

    def frame(self) -> bytes:
        """The text of the next one; shorter than 126 bytes, as greetings are."""
        while len(self._buffer) < 2 or len(self._buffer) < 2 + self._buffer[1]:
            self._more()
        size = self._buffer[1]
        text, self._buffer = self._buffer[2 : 2 + size], self._buffer[2 + size :]
        return text

    def skip(self, size: int) -> None:
        while len(self._buffer) < size:
            self._more()
        self._buffer = self._buffer[size:]

    def finish(self) -> None:
        if self._buffer:
            raise Failure(f"more came than expected: {self._buffer[:80]!r}")

    def _more(self) -> None:
        data = self._socket.recv(4096)
        if not data:
            raise Failure("the server has hung up")
        self._buffer += data


class WebSocketPublisher:
    def __init__(self, one: socket.socket, wrap: Callable[[bytes], bytes]) -> None:
        self._socket, self._wrap = one, wrap

    def publish(self, payloads: Sequence[bytes]) -> None:
        self._socket.sendall(b"".join(masked(self._wrap(payload)) for payload in payloads))


@contextmanager
def publisher(port: int, enter: Enter, wrap: Callable[[bytes], bytes]) -> Iterator[WebSocketPublisher]:
    """Connected, and brought in by `enter`; each payload is sent as one text frame."""
    with socket.create_connection(("127.0.0.1", port), 10) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = Line(one)
        enter(line)
        line.finish()
        yield WebSocketPublisher(one, wrap)


def plain_frame(payload: bytes) -> bytes:
    return text_frame(payload)


def greeted(line: Line, path: str) -> None:
    """In the room when the greeting has come."""
    line.upgrade(path)
    if line.frame() != b"hi":
        raise Failure("there was no greeting")
