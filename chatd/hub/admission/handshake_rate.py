"""Limits the rate of handshakes, for all addresses together, so that no single address uses up the budget.

While more than half of the budget is left, any address may take from it. The other half is reserved for
addresses that have recently had no more than their share.
"""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

SHARE = 10  # an address's share is one handshake in so many
ADDRESSES = 10_000  # addresses whose share is remembered; beyond it all are forgotten


class HandshakeRate:
    def __init__(self, a_second: int) -> None:
        """`a_second`: handshakes a second; 0: no limit."""
        self._rate = a_second
        self._all = TokenBucket(a_second, 2 * a_second, trio.current_time())
        self._of: dict[str, TokenBucket] = {}

    def take(self, address: str | None) -> bool:
        """Return whether this address may make a handshake now. None: many clients share the address, so it
        has no share of its own.
        """
        if not self._rate:
            return True
        now = trio.current_time()
        within_share = address is None or not self._share_of(address, now).take(now)
        if not within_share and self._all.level(now) < self._rate:
            return False
        return not self._all.take(now)

    def _share_of(self, address: str, now: float) -> TokenBucket:
        if address not in self._of:
            if len(self._of) >= ADDRESSES:
                self._of.clear()
            share = max(1.0, self._rate / SHARE)
            self._of[address] = TokenBucket(share, share, now)
        return self._of[address]

    def tidy(self) -> None:
        now = trio.current_time()
        self._of = {address: share for address, share in self._of.items() if share.used(now)}
