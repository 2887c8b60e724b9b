"""Reads in threads.

Above them, `chat` asks; what is read are the plain functions of `reads` and `snapshots`.
"""

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

DEADLINE = 10.0  # seconds; a read that takes longer is given up, its thread ends when the driver does

_LOST = (DBAPIError, PoolTimeout, Strayed, OSError)  # the last: there is no descriptor left to connect with

T = TypeVar("T")

_unavailable = Recurring("read_unavailable")


class Reader:
    """Runs reads in threads, as many at once as there are connections, so that waiting is cancellable."""

    def __init__(self, engine: Engine, readers: int, overdue: Callable[[], None] = lambda: None) -> None:
        """`overdue` is told of reads that took too long."""
        self._engine, self._overdue = engine, overdue
        self._limiter = trio.CapacityLimiter(readers)

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        """`read(connection, *arguments)` in one snapshot. Raises Unavailable."""
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
        """Connections that read just now."""
        return self._limiter.borrowed_tokens

    def _run(self, read: Callable[..., T], arguments: tuple[Any, ...], again: bool = True) -> T:
        try:
            with self._engine.connect() as connection:
                answer = read(connection, *arguments)
                if strayed(connection):
                    raise Strayed
                return answer
        except _LOST as error:
            # A pooled connection that died while idle says so at its first use; a read can be repeated.
            ended = isinstance(error, Strayed) or getattr(error, "connection_invalidated", False)
            if again and ended:
                return self._run(read, arguments, again=False)
            told = primary(error) or type(getattr(error, "orig", error)).__name__
            _unavailable.warn(read=read.__name__, error=told)
            raise Unavailable() from error
