"""How long to wait before the next attempt: longer each time, and never in step with others who try as well."""

from __future__ import annotations

import random

HALF = (0.5, 1.0)  # of the delay: the jitter that keeps attempts apart and most of the delay
_DOUBLINGS = 16  # beyond them every `most` is reached


def delay(attempt: int, first: float, most: float, jitter: tuple[float, float] = HALF) -> float:
    """Seconds before an attempt, the first of which is number 0: `first` doubled each time, up to `most`, times
    a random share between the two of `jitter`.
    """
    seconds: float = min(most, first * 2 ** min(attempt, _DOUBLINGS))
    return seconds * random.uniform(*jitter)


class Backoff:
    """Counts the attempts."""

    __slots__ = ("_attempt", "_first", "_most")

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most = first, most
        self._attempt = 0

    def next(self) -> float:
        """Seconds to wait now."""
        seconds = delay(self._attempt, self._first, self._most)
        self._attempt += 1
        return seconds

    def reset(self) -> None:
        """It has worked: the next failure is a new one."""
        self._attempt = 0
