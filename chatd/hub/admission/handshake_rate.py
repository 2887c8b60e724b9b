"""How many handshakes there may be: a budget for all, of which no address uses up the part that others need.

While more than half of it is there, whoever comes may take from it. The rest is for addresses that have had no
more than their share of late.
"""

from __future__ import annotations

import trio

from chatd.core.limits import TokenBucket

SHARE = 10  # one in so many handshakes is an address's share, whatever else it does
ADDRESSES = 10_000  # whose share is remembered; beyond it all begin anew


class HandshakeRate:
    def __init__(self, a_second: int) -> None:
        """0: no limit."""
        self._rate = a_second
        self._all = TokenBucket(a_second, 2 * a_second, trio.current_time())
        self._of: dict[str, TokenBucket] = {}

    def take(self, address: str | None) -> bool:
        """Whether somebody there may shake hands now. None: many share the address."""
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
