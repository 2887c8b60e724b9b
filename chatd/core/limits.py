"""Bounds that more than one module needs, and the token bucket behind every rate.

What an operator may set is in `config.Limits`; here is what the protocol promises or memory demands.
"""

from __future__ import annotations

MAX_ID = 2**53 - 1  # the largest integer that JavaScript keeps exactly
OPERATOR = MAX_ID  # the user, and the conversation, of an operator's own tools: nobody's account
REPLAY_CHANGES = 300  # changes in one answer; beyond it a client is told to page back
REPLAY_BYTES = 256 * 1024  # bytes of missed messages of one room; beyond it a client is told to page back
BEHIND_CHANGES = 10_000  # by which a live subscription may fall behind; beyond it the same
PORTION_BYTES = 128 * 1024  # of what it missed that are read for it at once, as the client takes them
ANSWER_BYTES = 32 * 1024  # of one `subscribed`, and of the messages in a `ready`: seconds, for a slow link
READY_BYTES = 384 * 1024  # bytes of heads and receipts in one `ready`, half of an outbox
INBOX_ROOMS = 1000  # rooms in an inbox, the most recently active; their heads are a quarter of an outbox
FALLBACK_MESSAGES = 50  # newest messages in an answer with `recovered: false`
HISTORY_PAGE = 50
HISTORY_PAGE_MAX = 100
UNREAD_MAX = 1000  # counted exactly up to here
BATCH_MESSAGES = 1000
EVENT_BYTES = 64 * 1024  # of an event that is not stored
AUTH_BYTES = 512  # of an `auth` beside its token, with a few rooms
CLIENT_ID_CHARS = 64
EMOJI_CHARS = 32
EMOJIS = 20  # different ones under a message
EMOJI_USERS = 20  # who gave one are named up to here; beyond it they are counted
META_DEPTH = 32  # nesting of `meta`: deeper is an attack or a mistake


class TokenBucket:
    """`rate` a second on average, `burst` at once. Time comes from the caller, in seconds."""

    __slots__ = ("_burst", "_level", "_rate", "_then")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._then = burst, now

    def wait(self, now: float) -> float:
        """Seconds until there is one to take."""
        self._refill(now)
        return 0.0 if self._level >= 1 else (1 - self._level) / self._rate

    def take(self, now: float) -> float:
        """Take one: 0.0 when there was one, else the seconds until there is."""
        self._refill(now)
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate

    def level(self, now: float) -> float:
        """How many there are to take."""
        self._refill(now)
        return self._level

    def charge(self, amount: float, now: float) -> None:
        """For what was done already: also more than there is, which the next ones wait for."""
        self._refill(now)
        self._level = max(self._level - amount, -self._burst)

    def used(self, now: float) -> bool:
        """Whether it is not full again yet."""
        self._refill(now)
        return self._level < self._burst

    def _refill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
