"""SQLite's log: kept small while that is possible, and told of while it is not.

The log can begin anew only in a moment in which nobody reads from it. Somebody who reads without an end (a
shell that was left open) makes it grow with every message, and nobody here can end that: an operator must hear
of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
import trio
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from chatd.observe import metrics
from chatd.store.engine import SQLITE_LOG_KEPT

PERIOD = 5.0  # seconds between two looks
LARGE = 64 * 1024 * 1024  # bytes; by then somebody has read for long

log = structlog.get_logger()


class Wal:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._file = Path(f"{engine.url.database}-wal")
        self._thread = trio.CapacityLimiter(1)
        self._large = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        task_status.started()
        while True:
            await self.look()
            await trio.sleep(PERIOD)

    async def look(self) -> None:
        """Cut the log if it is larger than need be and nobody reads from it."""
        if self._size() > SQLITE_LOG_KEPT:
            await trio.to_thread.run_sync(self._cut, limiter=self._thread)
        size = self._size()
        metrics.SQLITE_LOG.set(size)
        if (size > LARGE) is not self._large:
            self._large = size > LARGE
            if self._large:
                advice = "something reads the database without an end: find it with fuser or lsof, and end it"
                log.warning("sqlite_log_grows", file=str(self._file), bytes=size, advice=advice)
            else:
                log.info("sqlite_log_is_small", bytes=size)

    def _size(self) -> int:
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

    def _cut(self) -> None:
        """Nobody waits for it: what has to be copied is copied beside writers, and it waits for no reader."""
        try:
            with self._engine.connect() as connection:
                driver: Any = connection.connection.driver_connection
                patience = driver.execute("PRAGMA busy_timeout").fetchone()[0]
                driver.execute("PRAGMA busy_timeout = 0")
                try:
                    _, pages, copied = driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                    if pages == copied:
                        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                finally:
                    driver.execute(f"PRAGMA busy_timeout = {patience}")
        except SQLAlchemyError as error:  # the writer says it loudly enough
            log.debug("sqlite_log_not_cut", error=type(error).__name__)
