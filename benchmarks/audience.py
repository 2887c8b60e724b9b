"""Thousands of clients in one epoll loop that costs less than what it listens to.

Every byte is kept and compared with what should have come: each message at each client, once, in order, or it
fails. `subjects` says how a client of each server enters its room.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

CONNECT_SECONDS = 10.0
BUFFER_BYTES = 256 * 1024
SOURCES = 8  # addresses that the clients connect from, so that there are ports for all
LOOK = 0.05  # seconds between looks at whether all was sent

Enter = Callable[[socket.socket, int], None]


class Failure(Exception):
    """Something did not arrive, or something else did."""


class Audience:
    """Connected clients. `with Audience() as audience:` closes them."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._receive: dict[int, Callable[[bytearray], int]] = {}
        self._ready = select.epoll()
        self._buffer = bytearray(BUFFER_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            one.close()
        self._ready.close()

    def __len__(self) -> int:
        return len(self._sockets)

    def connect(self, port: int, enter: Enter) -> None:
        """One more client; `enter(socket, number)` brings it into the room."""
        number = len(self._sockets)
        source = (f"127.0.0.{2 + number % SOURCES}", 0)
        one = socket.create_connection(("127.0.0.1", port), CONNECT_SECONDS, source)
        self._sockets.append(one)
        enter(one, number)
        one.setblocking(False)
        self._receive[one.fileno()] = one.recv_into
        self._ready.register(one, select.EPOLLIN)

    def settle(self, seconds: float) -> None:
        """Read away what the server says by itself: nats-server sends its first PING after two seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._read({descriptor: bytearray() for descriptor in self._receive})

    def hear(self, send: Callable[[], bytes], seconds: float) -> float:
        """Call `send` in a thread, and read until everybody has exactly what it returns.

        Returns the seconds from the call to the last byte. Raises Failure, or what `send` raises.
        """
        got = {descriptor: bytearray() for descriptor in self._receive}
        sender = _Sender(send)
        began = time.monotonic()
        total, wanted = 0, None
        while wanted is None or total < wanted:
            total += self._read(got)
            if wanted is None and sender.done:
                wanted = len(sender.sent) * len(got)
            if time.monotonic() - began > seconds:
                raise Failure(f"after {seconds:.0f} s {total:,} bytes had come of {wanted or 'unknown':,}")
        elapsed = time.monotonic() - began
        for have in got.values():
            if have != sender.sent:
                raise Failure(f"a client got {_difference(bytes(have), sender.sent)}")
        return elapsed

    def _read(self, got: dict[int, bytearray]) -> int:
        """Bytes that had come, or came within a moment."""
        view, total = memoryview(self._buffer), 0
        for descriptor, _ in self._ready.poll(LOOK):
            size = self._receive[descriptor](self._buffer)
            if not size:
                raise Failure("a client was disconnected")
            got[descriptor] += view[:size]
            total += size
        return total


class _Sender(threading.Thread):
    """Sends beside the one who listens. `sent` is what everybody must get, once it is `done`."""

    def __init__(self, send: Callable[[], bytes]) -> None:
        super().__init__(daemon=True)
        self._send = send
        self._sent: bytes | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._sent = self._send()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        if self._error is not None:
            raise Failure(f"sending failed: {self._error}") from self._error
        return self._sent is not None

    @property
    def sent(self) -> bytes:
        assert self._sent is not None
        return self._sent


def _difference(have: bytes, wanted: bytes) -> str:
    place = next((n for n, (a, b) in enumerate(zip(have, wanted, strict=False)) if a != b), len(have))
    return f"{have[place : place + 80]!r} at byte {place}, not {wanted[place : place + 80]!r}"
