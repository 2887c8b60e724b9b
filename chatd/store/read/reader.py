"""Runs the functions of `lookups`, `members` and `snapshots` in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import trio
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chatd.core.errors import Unavailable
from chatd.observe import metrics
from chatd.observe.logs import Recurring
from chatd.store.failures import primary
from chatd.store.sessions import Strayed, strayed

DEADLINE = 10.0  # seconds after which a caller gives a read up; its thread ends when the driver returns

_LOST = (DBAPIError, PoolTimeout, Strayed, OSError)  # OSError: no file descriptor left for a connection

T = TypeVar("T")

_unavailable = Recurring("read_unavailable")


class Reader:
    """Runs reads in threads, as many at once as there are connections.

    Callers can be cancelled while they wait.
    """

    def __init__(self, engine: Engine, readers: int, overdue: Callable[[], None] = lambda: None) -> None:
        """`overdue` is called after each read that exceeds `DEADLINE`."""
        self._engine, self._overdue = engine, overdue
        self._limiter = trio.CapacityLimiter(readers)

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        """Run `read(connection, *arguments)` within one snapshot.

        Raises Unavailable, and what `read` raises.
        """
        started = trio.current_time()
        try:
            with trio.move_on_after(DEADLINE):
                return await trio.to_thread.run_sync(
                    self._run, read, arguments, limiter=self._limiter, abandon_on_cancel=True
                )
        finally:
            metrics.READ_SECONDS.observe(trio.current_time() - started)
        self._overdue()
        raise Unavailable()

    @property
    def in_use(self) -> int:
        """The number of connections that are reading now."""
        return self._limiter.borrowed_tokens

    def _run(self, read: Callable[..., T], arguments: tuple[Any, ...], again: bool = True) -> T:
        try:
            with self._engine.connect() as connection:
                answer = read(connection, *arguments)
                if strayed(connection):
                    raise Strayed
                return answer
        except _LOST as error:
            # A pooled connection that died while idle fails at its next use, and a read can be repeated safely.
            ended = isinstance(error, Strayed) or getattr(error, "connection_invalidated", False)
            if again and ended:
                return self._run(read, arguments, again=False)
            reason = primary(error) or type(getattr(error, "orig", error)).__name__
            _unavailable.warn(read=read.__name__, error=reason)
            raise Unavailable() from error
