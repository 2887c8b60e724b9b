"""How HTTP connections end at a stop: after their next answer at first, and then as soon as they are idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Leave:
    """Shared by all connections. Each wait for a client is a `patience` of it, which a stop can shorten."""

    def __init__(self, leaving: trio.Event) -> None:
        """`leaving`: from then on every answer says `Connection: close`, so that no pool keeps it."""
        self._leaving = leaving
        self._waits: dict[trio.CancelScope, float] = {}
        self._now = False
        self.full = trio.Event()  # nobody more is accepted
        self.done = 0  # requests and connections that have come and gone

    @property
    def soon(self) -> bool:
        return self._leaving.is_set()

    @property
    def now(self) -> bool:
        return self._now

    def let_go(self) -> None:
        """Accept nobody any more, and leave the address to others."""
        self.full.set()

    def at_once(self) -> None:
        self.let_go()
        self._now = True
        now = trio.current_time()
        for scope, last in self._waits.items():
            scope.deadline = min(scope.deadline, now + last)

    @contextmanager
    def patience(self, seconds: float, last: float) -> Iterator[None]:
        """A block that waits for the client, and is left when its time is over: so many seconds, and no more
        than `last` from `at_once` on.
        """
        with trio.move_on_after(min(seconds, last) if self._now else seconds) as scope:
            self._waits[scope] = last
            try:
                yield
            finally:
                del self._waits[scope]
