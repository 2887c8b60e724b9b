"""A circuit breaker: what fails again and again is left alone for a while, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from chatd.core.errors import Unavailable

MOST = 5  # failures in a row, then
REST = 5.0  # seconds in which nobody calls; after them one tries, and the others go on without


class Breaker:
    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0
        self._trying = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Raises Unavailable without a call while it is open; that of the block counts as a failure."""
        is_trial = self._failures >= MOST
        if is_trial and (self._trying or trio.current_time() < self._open_until):
            raise Unavailable("the backend does not answer")
        self._trying = is_trial
        try:
            yield
        except Unavailable:
            self._failures += 1
            self._open_until = trio.current_time() + REST
            raise
        except Exception:  # it has answered, if not what one had hoped for
            self._failures = 0
            raise
        else:
            self._failures = 0
        finally:
            if is_trial:
                self._trying = False
