"""How HTTP connections end when the daemon stops: at first each after its next answer, later all idle ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Leave:
    """The state of the stop, shared by all connections. Each wait for a client runs in a `patience` block,
    which a stop can shorten.
    """

    def __init__(self, leaving: trio.Event) -> None:
        """After `leaving` is set every answer has `Connection: close`, so that clients' connection pools drop
        the connection.
        """
        self._leaving = leaving
        self._waits: dict[trio.CancelScope, float] = {}
        self._now = False
        self.full = trio.Event()  # set when no more connections are accepted
        self.done = 0  # requests and connections that have ended

    @property
    def soon(self) -> bool:
        return self._leaving.is_set()

    @property
    def now(self) -> bool:
        return self._now

    def let_go(self) -> None:
        """Stop accepting, so that other processes can bind the address."""
        self.full.set()

    def at_once(self) -> None:
        self.let_go()
        self._now = True
        now = trio.current_time()
        for scope, last in self._waits.items():
            scope.deadline = min(scope.deadline, now + last)

    @contextmanager
    def patience(self, seconds: float, last: float) -> Iterator[None]:
        """A block that waits for the client. It is cancelled after `seconds`, and at most `last` seconds after
        `at_once`.
        """
        with trio.move_on_after(min(seconds, last) if self._now else seconds) as scope:
            self._waits[scope] = last
            try:
                yield
            finally:
                del self._waits[scope]
