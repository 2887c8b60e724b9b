"""The limits of one connection's requests: how many a second, and how many may wait for their answer."""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

WAITING = 32  # unanswered requests of a connection; while there are so many, no more is read (backpressure)
PER_SECOND = 50  # requests a second, on average; a chat client needs one or two
BURST = 300  # requests at once: a client that reconnects subscribes to all of its rooms
ROOMS_EACH = 10  # rooms of a login that count as one request
STRIKES = 100  # refusals for the rate before the connection is closed; one a second does not count


class Requests:
    __slots__ = ("_all_written", "_bucket", "_freed", "_strikes", "_waiting", "_writes")

    def __init__(self) -> None:
        self._bucket = TokenBucket(PER_SECOND, BURST, trio.current_time())
        self._strikes: TokenBucket | None = None
        self._waiting = 0  # requests that are not answered yet
        self._freed: trio.Event | None = None  # set when a request is answered, if a task waits for it
        self._writes = 0  # commands that the writer has not answered
        self._all_written: trio.Event | None = None  # set when there are none, if a task waits for it

    def take(self) -> float:
        """Count a request. Returns 0.0, or the seconds until the connection may make it."""
        return self._bucket.take(trio.current_time())

    def charge_rooms(self, rooms: int) -> None:
        """Count the rooms that a login has read, because a login with a thousand rooms costs more than one
        request.
        """
        self._bucket.charge(rooms / ROOMS_EACH, trio.current_time())

    def strike(self) -> bool:
        """Count a refusal for the rate. Returns whether the connection has had too many of them."""
        now = trio.current_time()
        if self._strikes is None:
            self._strikes = TokenBucket(1, STRIKES, now)
        return self._strikes.take(now) > 0

    async def slot(self) -> None:
        """Take one of the WAITING places, or wait for one. `free` gives it back."""
        while self._waiting >= WAITING:
            self._freed = trio.Event()
            await self._freed.wait()
        self._waiting += 1

    def free(self) -> None:
        self._waiting -= 1
        if self._freed is not None:
            self._freed.set()
            self._freed = None

    def submitted(self) -> None:
        """The writer has taken a command. The caller calls `written` when the writer has answered it."""
        self._writes += 1

    def written(self) -> None:
        self._writes -= 1
        if not self._writes and self._all_written is not None:
            self._all_written.set()

    async def all_written(self) -> None:
        """Wait until the writer has answered all commands of this connection."""
        if self._writes:
            self._all_written = trio.Event()
            await self._all_written.wait()
