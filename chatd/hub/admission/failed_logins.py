"""Limits the failed logins of an address. A user behind the same NAT as an attacker can still log in.

Each token is verified first, so a valid one is never refused for the failures of others. Only failures are
throttled: past the limit a minute the client gets `rate_limited`, and tokens from that address are verified a
few at a time, so that invalid tokens never take more than a small share of the time for verifying.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from chatd.core.errors import Unavailable
from chatd.core.limits import TokenBucket

ADDRESSES = 10_000  # addresses whose failures are remembered; beyond it the oldest address is forgotten
AT_ONCE = 2  # tokens of one address that are verified at once, after it has failed too often
PATIENCE = 10.0  # seconds that a token waits for its turn


class _Failures:
    __slots__ = ("bucket", "turns")

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket, self.turns = bucket, trio.CapacityLimiter(AT_ONCE)


class FailedLogins:
    def __init__(self) -> None:
        self._most = 0  # failures a minute; 0: no limit
        self._of: OrderedDict[str, _Failures] = OrderedDict()

    def allow(self, a_minute: int) -> None:
        """Set the limit and forget all failures so far."""
        self._most = a_minute
        self._of.clear()

    @asynccontextmanager
    async def turn(self, key: str | None) -> AsyncIterator[None]:
        """A block that verifies a token. Raises Unavailable if too many tokens of that address wait."""
        failures = self._of.get(key) if key else None
        if failures is None or not failures.bucket.wait(trio.current_time()):
            yield
            return
        with trio.move_on_after(PATIENCE) as waiting:
            await failures.turns.acquire()
        if waiting.cancelled_caught:
            raise Unavailable("too many logins from here are waiting")
        try:
            yield
        finally:
            failures.turns.release()

    def failed(self, key: str | None) -> float:
        """Count an invalid token. Returns 0.0, or the seconds for which further failures of that address are
        answered with `rate_limited`.
        """
        if not self._most or not key:
            return 0.0
        now = trio.current_time()
        failures = self._of.get(key)
        if failures is None:
            failures = self._of[key] = _Failures(TokenBucket(self._most / 60, self._most, now))
            if len(self._of) > ADDRESSES:
                self._of.popitem(last=False)
        return failures.bucket.take(now)

    def tidy(self) -> None:
        now = trio.current_time()
        for key, failures in list(self._of.items()):
            if not failures.bucket.used(now):
                del self._of[key]
