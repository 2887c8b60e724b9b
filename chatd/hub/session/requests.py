"""How much one connection may ask: so often, and so many that wait at once."""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

WAITING = 32  # requests of one connection; it is not read from while so many wait
PER_SECOND = 50  # requests of one connection, on average; a chat client needs one or two
BURST = 300  # a client that comes back subscribes to all of its rooms at once
ROOMS_EACH = 10  # rooms that a login may enter for one request
STRIKES = 100  # refusals for rate before the connection is closed; one a second is forgiven


class Requests:
    __slots__ = ("_all_written", "_bucket", "_freed", "_strikes", "_waiting", "_writes")

    def __init__(self) -> None:
        self._bucket = TokenBucket(PER_SECOND, BURST, trio.current_time())
        self._strikes: TokenBucket | None = None
        self._waiting = 0  # that are not answered yet
        self._freed: trio.Event | None = None  # set when one is, where somebody waits for that
        self._writes = 0  # that are at the writer
        self._all_written: trio.Event | None = None  # set when none is, where somebody waits for that

    def take(self) -> float:
        """0.0, or the seconds until there may be another."""
        return self._bucket.take(trio.current_time())

    def charge_rooms(self, rooms: int) -> None:
        """A login costs what it reads: one that enters a thousand rooms is not one request."""
        self._bucket.charge(rooms / ROOMS_EACH, trio.current_time())

    def strike(self) -> bool:
        """One was refused for its rate: whether that was one too many."""
        now = trio.current_time()
        if self._strikes is None:
            self._strikes = TokenBucket(1, STRIKES, now)
        return self._strikes.take(now) > 0

    async def slot(self) -> None:
        """Take one of the places for those that wait, or wait for it. `free` gives it back."""
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
        """The writer has a command of this connection, and will say what became of it: `written` then."""
        self._writes += 1

    def written(self) -> None:
        self._writes -= 1
        if not self._writes and self._all_written is not None:
            self._all_written.set()

    async def all_written(self) -> None:
        """Until the writer has nothing of this connection any more."""
        if self._writes:
            self._all_written = trio.Event()
            await self._all_written.wait()
