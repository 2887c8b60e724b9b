"""A peer's connection as trio-websocket sees it: a stream that also bounds what the peer may send, and
ends so that the peer still receives the last frames.
"""

from __future__ import annotations

import trio

from chatd.hub.connection.send_queue import LIMIT_BYTES, SendQueue

# Reads that a message may take. A 64 KiB frame takes 16 reads of 4 KiB, and some more over a slow link. A peer
# that sends single bytes exceeds this.
UNFINISHED_READS = 2000
# A lingering close: how long the peer may continue to send, how long it may pause, and how much it may send.
LINGER_SECONDS = 10.0
LINGER_PAUSE = 2.0
LINGER_BYTES = 16 * 1024 * 1024
LINGER_READ = 64 * 1024  # bytes of one read during a lingering close, all of which are thrown away


class PeerStream(SendQueue, trio.abc.Stream):
    """The send queue itself with an end to read from. A push so needs this one object only: with many
    connections, cache misses are most of its cost.
    """

    __slots__ = ("_unfinished_bytes", "_unfinished_most", "_unfinished_reads", "last_heard", "peer_finished")

    def __init__(
        self,
        stream: trio.SocketStream,
        nursery: trio.Nursery,
        *,
        unfinished_bytes: int,
        limit: int = LIMIT_BYTES,
    ) -> None:
        """`unfinished_bytes`: the bytes that a peer may send without finishing a message. `limit`: the bytes
        that may be queued.
        """
        super().__init__(stream, nursery, limit=limit)
        self._unfinished_most = unfinished_bytes
        self._unfinished_bytes = 0
        self._unfinished_reads = 0
        self.peer_finished = False  # the peer has closed its end or sent its close frame: nothing more comes
        self.last_heard = trio.current_time()

    # trio.abc.Stream, through which trio-websocket sends its handshake, pongs and close frames.

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.cut:
            raise trio.BrokenResourceError("the connection was cut")
        if data[:1] == b"\x8a":  # a pong: do not count the ping that it answers as an unfinished message
            self._allow_control_frame(len(data))
        self.answered = True
        if data[:1] == b"\x88":  # a close frame
            self.ended = self._close_sent = True
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
        if self.ended:  # the library reads only to find the peer's close frame
            return bytes(data)
        self._unfinished_bytes += len(data)
        self._unfinished_reads += 1
        # trio-websocket has a limit of its own, which does not bound everything.
        if self._unfinished_bytes > self._unfinished_most or self._unfinished_reads > UNFINISHED_READS:
            self.abort()
            raise trio.BrokenResourceError("the peer sent too much without finishing a message")
        return bytes(data)

    def _gone(self) -> None:
        """End a connection whose peer hangs up before its handshake. The library would wait for the rest of the
        request, and keep the place.
        """
        if not self.answered:
            self._nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """The library has finished. `linger` ends the connection, and the accept loop closes the socket."""
        self.ended = True
        await trio.lowlevel.checkpoint()

    # What a peer may send without finishing a message.

    def expect_pong(self, frame: bytes) -> None:
        """A ping is being sent: its pong shall not count as part of an unfinished message."""
        self._allow_control_frame(len(frame))

    def message_finished(self) -> None:
        self._unfinished_bytes = self._unfinished_reads = 0

    def _allow_control_frame(self, size: int) -> None:
        self._unfinished_bytes = max(0, self._unfinished_bytes - size - 4)  # a client's frame has a mask of 4
        self._unfinished_reads = max(0, self._unfinished_reads - 1)

    # The end.

    async def linger(self, seconds: float = LINGER_SECONDS) -> None:
        """End the connection so that the peer still receives the last frames. No other task may read any more.

        Closing a socket with unread input resets the connection, and the reset can overtake the close frame.
        So what the peer continues to send is read and thrown away, within bounds, until it closes its end.
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
                pass  # the peer has closed the connection first

    async def _flush_while_it_moves(self) -> None:
        """Flush the queue, but give up when the peer acknowledges nothing for LINGER_PAUSE seconds."""
        before = -1
        while self._queue and not self.cut and (taken := self.taken()) > before:
            before = taken
            self._flushing = True  # a late reply must not start a task: the connection's nursery is closed
            with trio.move_on_after(LINGER_PAUSE):
                await self._flush()
        self._flushing = True

    async def _discard(self) -> None:
        left = LINGER_BYTES
        while left > 0:
            with trio.move_on_after(LINGER_PAUSE) as pause:
                data = await self._stream.receive_some(LINGER_READ)
            if pause.cancelled_caught or not data:
                return
            left -= len(data)
