"""Exponential backoff with jitter, so that many clients of one server do not retry at the same moment."""

from __future__ import annotations

import random

HALF = (0.5, 1.0)  # jitter: each wait lasts between half of the delay and the whole delay
_DOUBLINGS = 16  # more would only make large numbers: every `most` in use is reached before


def delay(attempt: int, first: float, most: float, jitter: tuple[float, float] = HALF) -> float:
    """Seconds to wait before an attempt: min(most, first · 2^attempt), times a random factor within `jitter`.

    `attempt` counts from 0; `first` and `most` are seconds.
    """
    seconds: float = min(most, first * 2 ** min(attempt, _DOUBLINGS))
    return seconds * random.uniform(*jitter)


class Backoff:
    """Counts consecutive failures and returns the wait after each."""

    __slots__ = ("_attempt", "_first", "_most")

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._attempt = 0

    def next(self) -> float:
        """Count one more failure and return the seconds to wait after it."""
        seconds = delay(self._attempt, self._first, self._most)
        self._attempt += 1
        return seconds

    def reset(self) -> None:
        """An attempt has succeeded: the next wait is a short one again."""
        self._attempt = 0
