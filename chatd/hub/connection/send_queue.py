"""What is sent to one peer: `push` for frames that many clients share, and a queue behind it.

Only the send queue writes to the socket, so a cancelled task never leaves half a frame there. `push` never
waits: bytes that the kernel does not accept at once are queued, and a task flushes them that exists only while
there are any. The kernel holds at most `listen.SEND_BUFFER` of each connection, so the memory that a slow
consumer can cost has a bound.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections import deque

import trio

from chatd.observe import metrics

# Bytes that may be queued for a slow consumer before its connection is cut. Together with the kernel's buffer
# they are below 1 MiB.
LIMIT_BYTES = 768 * 1024
# Seconds that the peer has to acknowledge what was queued when they began: for a full queue, below 3 KB/s.
DRAIN_SECONDS = 300.0
JOIN_BYTES = 64 * 1024  # bytes of queued frames that one write joins
# Closes with a TCP reset, so that the kernel also frees the bytes it holds for a peer that does not read.
_LINGER_ZERO = struct.pack("ii", 1, 0)
# Linux's `struct tcp_info` up to `tcpi_bytes_acked`.
_TCP_INFO = socket.IPPROTO_TCP, socket.TCP_INFO, 128
_ACKNOWLEDGED = struct.Struct("=120xQ")

# Nearly all queues are empty nearly always. They share this one, because an empty deque takes 700 bytes.
_NOTHING: deque[bytes | memoryview] = deque(maxlen=0)


class SendQueue:
    # A push needs this one object only: with many connections, cache misses are most of its cost.
    __slots__ = (
        "_close_sent",
        "_descriptor",
        "_drain_begun",
        "_drain_goal",
        "_drained",
        "_flushing",
        "_limit",
        "_nursery",
        "_queue",
        "_queued",
        "_stream",
        "answered",
        "cut",
        "ended",
        "too_slow",
    )

    def __init__(self, stream: trio.SocketStream, nursery: trio.Nursery, *, limit: int = LIMIT_BYTES) -> None:
        """`limit`: the bytes that may be queued."""
        self._stream, self._nursery = stream, nursery
        self._descriptor = stream.socket.fileno()
        self._limit = limit
        self._queue: deque[bytes | memoryview] = _NOTHING
        self._queued = 0
        self._flushing = False
        self._drained: trio.Event | None = None  # set after each write of queued bytes, if a task waits for it
        self._drain_goal = 0  # the peer must acknowledge this position DRAIN_SECONDS after `_drain_begun`
        self._drain_begun = trio.current_time()
        self.answered = False  # the library has sent something: a refusal, status 101 or a close frame
        self.ended = False  # a close frame was sent or is due: no event is pushed any more
        self._close_sent = False  # a close frame was sent
        self.cut = False  # the connection was reset without a close frame
        self.too_slow = False  # it was cut because the peer did not read

    @property
    def queued(self) -> int:
        """Bytes that the kernel has not accepted yet."""
        return self._queued

    @property
    def congested(self) -> bool:
        """Whether more than half of the limit is queued: optional frames are dropped then."""
        return self._queued > self._limit // 2

    def push(self, frames: bytes) -> None:
        """Send whole frames, now or as soon as the peer reads. Once a close frame is due, nothing is sent.

        Past the limit the connection is cut, but only if it was congested before: the operator may allow
        messages that are larger than the limit, and one of these must not cut a connection.
        """
        if not self.ended:
            self._put(frames)

    def reply(self, frames: bytes) -> None:
        """Send the reply to a command. Unlike `push` it also sends while a close frame is due."""
        if not self._close_sent:
            self._put(frames)

    def try_push(self, frames: bytes) -> bool:
        """Push frames that can be read again later. Returns False and pushes nothing if the queue is
        congested.
        """
        if self._queued and self.congested:
            return False
        if not self.ended:  # the same as `push`, without a call: nearly all frames are sent this way
            self._put(frames)
        return True

    def offer(self, frames: bytes) -> bool:
        """Push optional frames. If the queue is congested, drop them and return False, so that there is room
        for messages.
        """
        if self.congested:
            metrics.SHED.inc()
            return False
        self.push(frames)
        return True

    def _put(self, frames: bytes) -> None:
        if self.cut:
            return
        data: bytes | memoryview = frames
        if not self._queued:
            sent = self._write(frames)
            if sent == len(frames) or self.cut:
                return
            data = memoryview(frames)[sent:]
        was_congested = self.congested
        if self._queue is _NOTHING:
            self._queue = deque()
        self._queue.append(data)
        self._queued += len(data)
        metrics.QUEUE_DEPTH.observe(self._queued)
        if was_congested and self._queued > self._limit:
            self.too_slow = True
            self.abort()
        elif not self._flushing:
            self._flushing = True
            self._nursery.start_soon(self._flush)

    async def uncongested(self) -> None:
        """Wait until the queue is not congested. The caller reads no further request before (backpressure)."""
        await self.below(self._limit // 2 + 1)

    async def below(self, size: int) -> None:
        """Wait until fewer than `size` bytes are queued, or the connection was cut."""
        while self._queued >= size and not self.cut:
            await self._something()

    def taken(self) -> int:
        """Return how many bytes the peer's TCP has acknowledged since the connection began."""
        found: int = _ACKNOWLEDGED.unpack_from(self._stream.socket.getsockopt(*_TCP_INFO))[0]
        return found

    def pushed(self) -> int:
        """Return how many bytes were sent or queued so far. When `taken` reaches this, the peer has them
        all.
        """
        left = fcntl.ioctl(self._descriptor, termios.TIOCOUTQ, bytes(4))
        return self.taken() + int.from_bytes(left, "little") + self._queued

    def check_drain(self, now: float) -> None:
        """Cut a peer that reads the queue too slowly. To be called regularly."""
        if not self._queued or self.cut:
            self._drain_goal = 0
        elif not self._drain_goal or self.taken() >= self._drain_goal:
            self._drain_goal, self._drain_begun = self.pushed(), now
        elif now - self._drain_begun > DRAIN_SECONDS:
            self.too_slow = True
            self.abort()

    def abort(self) -> None:
        """Cut the connection now, without a close frame: it would queue behind bytes that the peer does not
        read.
        """
        if self.cut:
            return
        self.cut = True
        self._queue = _NOTHING
        self._queued = 0
        self._wake()
        try:
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self._stream.socket.shutdown(socket.SHUT_RDWR)  # wakes the reader
        except OSError:
            pass  # the peer has closed the connection first

    def let_go(self) -> None:
        """Write nothing more, although the writer may still commit a command of this peer and reply to it.

        The caller closes the socket after this, and the next file that is opened may get the same descriptor.
        """
        self.ended = self._close_sent = self.cut = True
        self._queue = _NOTHING
        self._queued = 0

    # Waiting.

    async def _something(self) -> None:
        if self._drained is None:
            self._drained = trio.Event()
        await self._drained.wait()

    def _wake(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    # Writing.

    def _write(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return 0
        except OSError:
            self.abort()
            return 0

    async def _flush(self) -> None:
        try:
            while self._queue and not self.cut:
                await trio.lowlevel.wait_writable(self._stream.socket)
                if not self.cut:
                    self._write_queued()
        except (OSError, trio.ClosedResourceError):
            self.abort()
        finally:
            self._flushing = False
            if not self._queue:
                self._queue = _NOTHING

    def _write_queued(self) -> None:
        data = self._queue[0] if len(self._queue) == 1 else self._join()
        sent = self._write(data)
        self._queued -= sent
        if self.cut:
            return
        if sent == len(data):
            self._queue.popleft()
        elif sent:
            self._queue[0] = memoryview(data)[sent:]
        self._wake()

    def _join(self) -> bytes | memoryview:
        """Join the first frames of the queue into one, and return it."""
        taken: list[bytes | memoryview] = []
        size = 0
        while self._queue and (not taken or size + len(self._queue[0]) <= JOIN_BYTES):
            taken.append(self._queue.popleft())
            size += len(taken[-1])
        joined = b"".join(taken)
        self._queue.appendleft(joined)
        return joined
