"""A connection's socket as trio-websocket sees it, with `push` for frames that many clients share.

Only the send_queue writes to the socket, so a cancelled task never leaves half a frame behind. `push` never
waits: what the kernel does not take at once is queued, in bytes, and flushed by a task that exists only then.
The kernel itself holds at most `listen.SEND_BUFFER` of each connection, so a slow reader's cost is known.
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

# What a slow reader may cost here before its connection is cut. With what the kernel holds it is below 1 MiB.
LIMIT_BYTES = 768 * 1024
# Seconds in which the peer must take what was queued when they began: less than 3 KB/s of a full queue.
DRAIN_SECONDS = 300.0
JOIN_BYTES = 64 * 1024  # queued frames written at once
# Reads since the last finished message. An honest 64 KiB frame takes 16 of 4 KiB, a dripping one some more.
UNFINISHED_READS = 2000
# A lingering close: how long the peer may go on sending, how long it may pause, and how much it may send.
LINGER_SECONDS = 10.0
LINGER_PAUSE = 2.0
LINGER_BYTES = 16 * 1024 * 1024
LINGER_READ = 64 * 1024  # of one read: all of it is thrown away
# Close without a goodbye also frees what the kernel holds for a peer that does not read.
_LINGER_ZERO = struct.pack("ii", 1, 0)
# Linux's `struct tcp_info` up to `tcpi_bytes_acked`.
_TCP_INFO = socket.IPPROTO_TCP, socket.TCP_INFO, 128
_ACKNOWLEDGED = struct.Struct("=120xQ")

_NOTHING: deque[bytes | memoryview] = deque(maxlen=0)  # nearly always: an empty one of its own has 700 bytes


class SendQueue(trio.abc.Stream):
    # A push finds all it needs in this one object: among many connections, memory is what Python waits for.
    __slots__ = (
        "_descriptor",
        "_drain_begun",
        "_drain_goal",
        "_drained",
        "_flushing",
        "_limit",
        "_nursery",
        "_queue",
        "_queued",
        "_said_goodbye",
        "_stream",
        "_unfinished_bytes",
        "_unfinished_most",
        "_unfinished_reads",
        "answered",
        "cut",
        "ended",
        "last_heard",
        "peer_finished",
        "too_slow",
    )

    def __init__(
        self,
        stream: trio.SocketStream,
        nursery: trio.Nursery,
        *,
        unfinished_bytes: int,
        limit: int = LIMIT_BYTES,
    ) -> None:
        """`unfinished_bytes`: what a peer may send without finishing a message."""
        self._stream, self._nursery = stream, nursery
        self._descriptor = stream.socket.fileno()
        self._limit = limit
        self._queue: deque[bytes | memoryview] = _NOTHING
        self._queued = 0
        self._flushing = False
        self._drained: trio.Event | None = None  # set when much has been sent, where somebody waits for that
        self._unfinished_most = unfinished_bytes
        self._unfinished_bytes = 0
        self._unfinished_reads = 0
        self.peer_finished = False  # nothing more comes: it has closed its end, or said goodbye
        self._drain_goal = 0  # a position that must be reached within DRAIN_SECONDS of `_drain_begun`
        self._drain_begun = trio.current_time()
        self.answered = False  # the peer was told something: a refusal, 101, a goodbye
        self.ended = False  # a goodbye was said or is due: no event follows it
        self._said_goodbye = False
        self.cut = False  # ended without a goodbye
        self.too_slow = False  # … because the peer did not read
        self.last_heard = trio.current_time()

    @property
    def queued(self) -> int:
        """Bytes the kernel has not taken yet."""
        return self._queued

    @property
    def congested(self) -> bool:
        """Past half of the limit: leave out what may be left out."""
        return self._queued > self._limit // 2

    def push(self, frames: bytes) -> None:
        """Send whole frames, now or as soon as the peer reads. Past the limit the connection is cut, unless it
        was not congested before: one message may be larger than an outbox, where the operator allows that.

        After a goodbye nothing is sent any more.
        """
        if not self.ended:
            self._put(frames)

    def reply(self, frames: bytes) -> None:
        """Send the answer to a command: also when a goodbye is due, but not when it was said."""
        if not self._said_goodbye:
            self._put(frames)

    def try_push(self, frames: bytes) -> bool:
        """Push what can be read again later: False, and nothing is pushed, past half of the limit."""
        if self._queued and self.congested:
            return False
        if not self.ended:  # as `push`: nearly all that is ever sent comes this way
            self._put(frames)
        return True

    def offer(self, frames: bytes) -> bool:
        """Push what may be left out: past half of the limit it is, so that messages keep their place.

        False where it was left out.
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

    def expect_pong(self, frame: bytes) -> None:
        """A ping is on its way: its answer is not counted as an unfinished message."""
        self._allow_control_frame(len(frame))

    def message_finished(self) -> None:
        self._unfinished_bytes = self._unfinished_reads = 0

    async def uncongested(self) -> None:
        """Wait until the peer has read what it asked for, before more is read from it."""
        await self.below(self._limit // 2 + 1)

    async def below(self, size: int) -> None:
        """Wait until fewer bytes than that are queued."""
        while self._queued >= size and not self.cut:
            await self._something()

    def taken(self) -> int:
        """How many bytes the peer's TCP has acknowledged since the connection began."""
        found: int = _ACKNOWLEDGED.unpack_from(self._stream.socket.getsockopt(*_TCP_INFO))[0]
        return found

    def pushed(self) -> int:
        """How many bytes were sent or queued so far: when `taken` has reached this, the peer has them all."""
        left = fcntl.ioctl(self._descriptor, termios.TIOCOUTQ, bytes(4))
        return self.taken() + int.from_bytes(left, "little") + self._queued

    def check_drain(self, now: float) -> None:
        """Cut a peer that takes too long for what is queued. To be called again and again."""
        if not self._queued or self.cut:
            self._drain_goal = 0
        elif not self._drain_goal or self.taken() >= self._drain_goal:
            self._drain_goal, self._drain_begun = self.pushed(), now
        elif now - self._drain_begun > DRAIN_SECONDS:
            self.too_slow = True
            self.abort()

    async def linger(self, seconds: float = LINGER_SECONDS) -> None:
        """End the connection so that the peer sees what it was told last. Nobody else reads any more.

        To close a socket with unread input resets the connection, and the reset overtakes the goodbye. So what
        the peer goes on sending is read and thrown away, within bounds, until it has closed its end.
        """
        self.ended = True
        if self.cut or not self.answered:
            return
        with trio.move_on_after(seconds):
            try:
                await self._flush_while_it_moves()
                if not self._queue and not self.cut and not self.peer_finished:
                    await self._stream.send_eof()
                    await self._discard()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the peer was faster

    async def _flush_while_it_moves(self) -> None:
        """A peer that takes nothing at all, because its link is dark, say, is not waited for."""
        before = -1
        while self._queue and not self.cut and (taken := self.taken()) > before:
            before = taken
            with trio.move_on_after(LINGER_PAUSE):
                await self._flush()

    async def _discard(self) -> None:
        left = LINGER_BYTES
        while left > 0:
            with trio.move_on_after(LINGER_PAUSE) as pause:
                data = await self._stream.receive_some(LINGER_READ)
            if pause.cancelled_caught or not data:
                return
            left -= len(data)

    def abort(self) -> None:
        """Cut the connection now, without a goodbye: it would queue behind what the peer does not read."""
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
            pass  # the peer was faster

    def let_go(self) -> None:
        """Write no more, whoever still has an answer for this peer: the writer may commit its command later.

        The socket is closed after this, and the next file that is opened may get the same descriptor.
        """
        self.ended = self._said_goodbye = self.cut = True
        self._queue = _NOTHING
        self._queued = 0

    # trio.abc.Stream, for trio-websocket: its handshake, pongs and goodbyes go the same way.

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.cut:
            raise trio.BrokenResourceError("the connection was cut")
        if data[:1] == b"\x8a":  # a pong: the ping that it answers was no unfinished message
            self._allow_control_frame(len(data))
        self.answered = True
        if data[:1] == b"\x88":
            self.ended = self._said_goodbye = True
        self._put(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self.uncongested()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            data = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._gone()
            raise
        self.last_heard = trio.current_time()
        if not data:
            self.peer_finished = True
            self._gone()
        if self.ended:  # what comes now is read only to find the peer's own goodbye
            return bytes(data)
        self._unfinished_bytes += len(data)
        self._unfinished_reads += 1
        # trio-websocket counts the text of a message, not the frames: 200,000 empty ones would pass.
        if self._unfinished_bytes > self._unfinished_most or self._unfinished_reads > UNFINISHED_READS:
            self.abort()
            raise trio.BrokenResourceError("the peer sent too much without finishing a message")
        return bytes(data)

    def _gone(self) -> None:
        """Who hangs up before its handshake has no use for its place: the library would wait for the rest."""
        if not self.answered:
            self._nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """The library is done with the connection. `linger` ends it, and the accept loop closes the socket."""
        self.ended = True
        await trio.lowlevel.checkpoint()

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
        """Make one write of the first frames."""
        taken: list[bytes | memoryview] = []
        size = 0
        while self._queue and (not taken or size + len(self._queue[0]) <= JOIN_BYTES):
            taken.append(self._queue.popleft())
            size += len(taken[-1])
        joined = b"".join(taken)
        self._queue.appendleft(joined)
        return joined

    def _allow_control_frame(self, size: int) -> None:
        self._unfinished_bytes = max(0, self._unfinished_bytes - size - 4)  # a client's frame has a mask of 4
        self._unfinished_reads = max(0, self._unfinished_reads - 1)
