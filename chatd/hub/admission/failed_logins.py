"""Failed logins of an address. Whoever shares it with a guesser, behind a NAT, gets in all the same.

Each token is verified first, so a valid one is never refused for the failures of others. What is throttled is
the failure: past so many in a minute it is told as `rate_limited`, and tokens from that address are verified a
few at a time, so that bad ones never take more than a small share of what verifying costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from chatd.core.errors import Unavailable
from chatd.core.limits import TokenBucket

ADDRESSES = 10_000  # whose failures are remembered; beyond it the oldest are let off
AT_ONCE = 2  # tokens of one address that are verified, once it has failed too often
PATIENCE = 10.0  # seconds that a token waits for its turn


class _Failures:
    __slots__ = ("bucket", "turns")

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket, self.turns = bucket, trio.CapacityLimiter(AT_ONCE)


class FailedLogins:
    def __init__(self) -> None:
        self._most = 0  # a minute; 0: no limit
        self._of: OrderedDict[str, _Failures] = OrderedDict()

    def allow(self, a_minute: int) -> None:
        """Begin anew with this limit."""
        self._most = a_minute
        self._of.clear()

    @asynccontextmanager
    async def turn(self, key: str | None) -> AsyncIterator[None]:
        """A block that verifies a token. Raises Unavailable if too many from there wait."""
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
        """A token from there was not valid: 0.0, or the seconds until the next failure is told as one."""
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
