"""Limits requests without the token: from health probes, Prometheus, browsers on the status page, or anybody.

They are answered first in, first out, at a limited rate, so that most of the event loop's time is left for
backends and clients.
"""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

RATE = 50.0  # requests a second; the most expensive one, of /metrics, takes about 6 ms
BURST = 100.0


class Strangers:
    """The rate limit, shared by all connections of the API."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(RATE, BURST, trio.current_time())
        self._queue = trio.StrictFIFOLock()

    async def turn(self) -> None:
        """Wait for this request's turn."""
        async with self._queue:
            await trio.sleep(self._bucket.wait(trio.current_time()))
            self._bucket.charge(1, trio.current_time())
