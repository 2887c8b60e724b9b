"""A WebSocket client that costs little: a thousand of them share a core with what they test.

It trusts its server's framing, and leaves everything that frames mean to `crowd`.
"""

from __future__ import annotations

import math

import msgspec
import trio
from msgspec import Struct

OPEN_SECONDS = 5.0
RECEIVE_BYTES = 256 * 1024
MASK = bytes(4)  # a client must mask what it sends; zeros change nothing
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10

_REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Change(Struct):
    """A flat message, as far as a checker needs it."""

    event: str
    id: int = 0
    seq: int = 0
    content: str | None = None
    client_id: str | None = None
    mark: str | None = None


class RoomAnswer(Struct):
    conversation_id: int
    seq: int
    recovered: bool
    epoch: str
    changes: list[Change] = []
    mark: str | None = None


class Frame(Struct):
    """Any event of the server, with the fields of all of them."""

    event: str
    ref: int | None = None
    conversation_id: int = 0
    id: int = 0
    seq: int = 0
    content: str | None = None
    client_id: str | None = None
    mark: str | None = None
    code: str = ""
    recovered: bool = True
    epoch: str = ""
    changes: list[Change] = []
    rooms: dict[str, RoomAnswer] = {}
    duplicate: bool = False
    retryable: bool = False


class Closed(Exception):
    """The connection ended. `code` is 0 where it did so without a close frame.

    `retry_after` is what a server asked for that refused the handshake, in seconds.
    """

    def __init__(self, code: int, retry_after: float = 0.0) -> None:
        super().__init__(f"closed with {code}")
        self.code, self.retry_after = code, retry_after


_decode = msgspec.json.Decoder(Frame).decode


class Line:
    """An open WebSocket. Whatever breaks it is raised as Closed, `silence` seconds without a byte among it."""

    silence = math.inf

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._sending = trio.Lock()

    @classmethod
    async def open(cls, port: int, source: str) -> Line:
        """Raises Closed, or OSError where nobody listens."""
        socket = trio.socket.socket()
        try:
            await socket.bind((source, 0))
            with trio.fail_after(OPEN_SECONDS):
                await socket.connect(("127.0.0.1", port))
                line = cls(trio.SocketStream(socket))
                await line._stream.send_all(_REQUEST)
                while (end := line._buffer.find(b"\r\n\r\n")) < 0:
                    await line._read()
        except trio.TooSlowError:
            socket.close()
            raise Closed(0) from None
        except BaseException:
            socket.close()
            raise
        if not line._buffer.startswith(b"HTTP/1.1 101"):
            socket.close()
            raise Closed(0, _retry_after(bytes(line._buffer[:end])))
        del line._buffer[: end + 4]
        return line

    def close(self) -> None:
        """At once, without a goodbye: the client that is tested for has lost its network."""
        self._stream.socket.close()

    async def close_well(self) -> None:
        """With a goodbye, and without waiting for the server's."""
        await self._send(CLOSE, (1000).to_bytes(2, "big"))

    async def send(self, event: str, **fields: object) -> None:
        await self._send(TEXT, msgspec.json.encode({"event": event} | fields))

    async def receive(self) -> list[Frame]:
        """What has come, at least one frame."""
        return [_decode(text) for text in await self.texts()]

    async def texts(self) -> list[bytes]:
        """… as it is."""
        texts: list[bytes] = []
        while True:
            while (part := self._next()) is not None:
                opcode, payload = part
                if opcode == TEXT:
                    texts.append(payload)
                elif opcode == PING:
                    await self._send(PONG, payload)
                elif opcode == CLOSE:
                    await self._send(CLOSE, payload[:2])
                    raise Closed(int.from_bytes(payload[:2], "big"))
            if texts:
                return texts
            await self._read()

    def _next(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, start = buffer[1], 2
        if size == 126:
            start = 4
        elif size == 127:
            start = 10
        if len(buffer) < start:
            return None
        if start > 2:
            size = int.from_bytes(buffer[2:start], "big")
        if len(buffer) < start + size:
            return None
        payload = bytes(buffer[start : start + size])
        opcode = buffer[0] & 15
        del buffer[: start + size]
        return opcode, payload

    async def _read(self) -> None:
        try:
            with trio.fail_after(self.silence):
                data = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            raise Closed(0) from None
        if not data:
            raise Closed(0)
        self._buffer += data

    async def _send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        head = bytes([0x80 | opcode, 0x80 | size]) if size < 126 else bytes([0x80 | opcode, 0xFE])
        if size >= 126:
            head += size.to_bytes(2, "big")
        try:
            async with self._sending:
                await self._stream.send_all(head + MASK + payload)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Closed(0) from None


def _retry_after(head: bytes) -> float:
    after = head.lower().partition(b"retry-after:")[2].partition(b"\r\n")[0].strip()
    return float(after) if after else 0.0
