"""Requests of those who have not shown the token: probes, Prometheus, a browser on the status page, or anybody.

They are answered in the order in which they come, and so many a second, so that however many there are, most of
the loop's time is left to backends and clients.
"""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

RATE = 50.0  # requests a second; the dearest, of /metrics, takes some 6 ms
BURST = 100.0


class Strangers:
    """One for all connections of the API."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(RATE, BURST, trio.current_time())
        self._queue = trio.StrictFIFOLock()

    async def turn(self) -> None:
        """Until it is one's turn."""
        async with self._queue:
            await trio.sleep(self._bucket.wait(trio.current_time()))
            self._bucket.charge(1, trio.current_time())
