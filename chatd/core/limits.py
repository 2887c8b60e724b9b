"""Fixed limits that several modules use, and the token bucket behind every rate limit.

An operator cannot change these: the protocol promises them, or they bound memory. `config.Limits` has the
others.
"""

from __future__ import annotations

MAX_ID = 2**53 - 1  # the largest integer that JavaScript keeps exactly
OPERATOR = MAX_ID  # user id and conversation id for the operator's own tools; no account has this id
REPLAY_CHANGES = 300  # missed changes in one answer; a client that missed more gets `recovered: false`
REPLAY_BYTES = 256 * 1024  # the same limit in bytes of one room's missed messages
BEHIND_CHANGES = 10_000  # the same limit for a live subscription that lags behind
PORTION_BYTES = 128 * 1024  # bytes of missed changes that are read at once for a lagging subscription
ANSWER_BYTES = 32 * 1024  # bytes of one `subscribed`, and of the messages in a `ready`: seconds on a slow link
READY_BYTES = 384 * 1024  # bytes of heads and receipts in one `ready`: half of an outbox
INBOX_ROOMS = 1000  # rooms in an inbox, the most recently active; their heads fill a quarter of an outbox
FALLBACK_MESSAGES = 50  # newest messages in an answer with `recovered: false`
HISTORY_PAGE = 50
HISTORY_PAGE_MAX = 100
UNREAD_MAX = 1000  # unread counts stop here
BATCH_MESSAGES = 1000
EVENT_BYTES = 64 * 1024  # bytes of an event that is not stored
AUTH_BYTES = 512  # bytes of an `auth` frame with a few rooms, without the token
CLIENT_ID_CHARS = 64
EMOJI_CHARS = 32
EMOJIS = 20  # different emojis on one message
EMOJI_USERS = 20  # user ids that a message lists for each emoji; further users are only counted
META_DEPTH = 32  # levels of nesting in `meta`; deeper ones are an attack or a mistake


class TokenBucket:
    """Allows `rate` tokens a second on average and `burst` at once. The caller passes the time, in seconds."""

    __slots__ = ("_burst", "_level", "_rate", "_then")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._then = burst, now

    def wait(self, now: float) -> float:
        """Seconds until there is a token to take; 0.0 if there is one."""
        self._refill(now)
        return 0.0 if self._level >= 1 else (1 - self._level) / self._rate

    def take(self, now: float) -> float:
        """Take one token and return 0.0, or return the seconds until there is one."""
        self._refill(now)
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate

    def level(self, now: float) -> float:
        """Tokens in the bucket; below 0 if `charge` took more than there were."""
        self._refill(now)
        return self._level

    def charge(self, amount: float, now: float) -> None:
        """Take `amount` tokens for work already done, even if there are fewer: later callers wait for the rest.

        The debt is at most `burst`.
        """
        self._refill(now)
        self._level = max(self._level - amount, -self._burst)

    def used(self, now: float) -> bool:
        """Whether the bucket is not full."""
        self._refill(now)
        return self._level < self._burst

    def _refill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
