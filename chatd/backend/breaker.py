"""A circuit breaker: after several failures in a row, calls fail at once for a while, so
that clients do not wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from chatd.core.errors import Unavailable

MOST = 5  # failures in a row that open the breaker
REST = 5.0  # seconds without calls; then one call is tried while all others still fail at once


class Breaker:
    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0
        self._trying = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """A block that makes one call. While the breaker is open, raises Unavailable before the block.

        Unavailable from the block counts as a failure.
        """
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
        except Exception:  # the backend has answered, so this is no failure of the connection
            self._failures = 0
            raise
        else:
            self._failures = 0
        finally:
            if is_trial:
                self._trying = False
