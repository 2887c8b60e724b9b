"""Reads the changes and kicks of other nodes from Redis streams.

The reader runs in a thread of its own, and passes what it reads to the receiver in Trio's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import redis
import trio

from chatd.bus import Receiver, kicks, payloads
from chatd.bus.client import LOST, STREAM, in_thread, last_id, order
from chatd.bus.trimming import Trimming, trim_at_start
from chatd.config import Redis
from chatd.core.model import Kick
from chatd.observe.fatal import run_fatal

READ_COUNT = 1000  # most entries of one XREAD; more would block the loop for over 10 ms
READ_BYTES = 2 * 1024 * 1024  # approximate bytes of one XREAD, guessed from the size of the last entries
BLOCK = 500  # ms that an XREAD waits, and a stop has to wait for the thread; less than the socket's timeout
BATCHES = 4  # batches read ahead of the fanout; then a slow fanout slows the reader (backpressure)


class StreamReader:
    """Reads the streams of changes and kicks with XREAD, in batches.

    After an outage it continues where it was.
    """

    def __init__(self, config: Redis, node: str, receiver: Receiver) -> None:
        self._config, self._node, self._receiver = config, node, receiver
        self._position = ""

    async def serve(self, client: redis.Redis, up: Callable[[], None]) -> None:
        """Read until Redis fails; calls `up` when it answers. Raises one of `LOST`."""
        send, receive = trio.open_memory_channel[list[Any]](BATCHES)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_fatal, self._take_batches, receive)
            try:
                await in_thread(self._read, client, send, up)
            except LOST as error:
                failure = error
            nursery.cancel_scope.cancel()
        raise failure

    def _read(
        self, client: redis.Redis, send: trio.MemorySendChannel[list[Any]], up: Callable[[], None]
    ) -> None:
        last = last_id(client)
        if not self._position or order(last) < order(self._position):
            self._position = last  # first start, or Redis was flushed: the sweep finds missed changes
        trimming = Trimming(self._config.stream_bytes)
        trim_at_start(client, STREAM, self._config.stream_bytes)
        trio.from_thread.run_sync(up)
        count = READ_COUNT // 10  # a careful start, before the size of entries is known
        kicked = kicks.BEGINNING  # read all kicks again: each ends only connections older than itself
        while True:
            trio.from_thread.check_cancelled()
            wanted: dict[Any, Any] = {STREAM: self._position, kicks.STREAM: kicked}
            reply: Any = client.xread(wanted, count=count, block=BLOCK)
            if not reply:
                last = last_id(client)
                if order(last) < order(self._position):
                    self._position, kicked = last, kicks.BEGINNING
                    trio.from_thread.run_sync(self._receiver.lost)
                continue
            for name, entries in reply:
                if name == kicks.STREAM.encode():
                    kicked = entries[-1][0].decode()
                    trio.from_thread.run_sync(self._take_kicks, kicks.heard(client, entries, self._node))
                else:
                    count = fitting_count(entries)
                    self._position = entries[-1][0].decode()
                    trio.from_thread.run(send.send, entries)
                    if cut := trimming.add(entries):
                        client.xtrim(STREAM, minid=cut, approximate=True)

    def _take_kicks(self, heard: list[Kick]) -> None:
        for kick in heard:
            self._receiver.signal(kick)

    async def _take_batches(self, receive: trio.MemoryReceiveChannel[list[Any]]) -> None:
        own = self._node.encode()
        async for entries in receive:
            others = (payloads.change_of(fields) for _, fields in entries if fields.get(b"n") != own)
            self._receiver.changes([change for change in others if change is not None])


def fitting_count(entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> int:
    """The number of entries of this average size that fill `READ_BYTES`; from 1 to READ_COUNT."""
    size = sum(len(value) for _, fields in entries for value in fields.values())
    return max(1, min(READ_COUNT, READ_BYTES * len(entries) // max(size, 1)))
