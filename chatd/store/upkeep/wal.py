"""Keeps SQLite's write-ahead log small, and warns if that is not possible.

SQLite can truncate the log only at a moment when nobody reads from it. A read transaction that never ends (an
open shell, for example) makes it grow with every message. chatd cannot end that, so it warns the operator.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import structlog
import trio
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from chatd.observe import metrics
from chatd.store.engine import SQLITE_LOG_KEPT
from chatd.store.files import beside

PERIOD = 5.0  # seconds between two checks
LARGE = 64 * 1024 * 1024  # bytes; a log of this size means that a read transaction has been open for long

log = structlog.get_logger()


class Wal:
    def __init__(self, engine: Engine, file: Path) -> None:
        self._engine = engine
        self._file = beside(file, "-wal")
        self._thread = trio.CapacityLimiter(1)
        self._large = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check every `PERIOD` seconds until it is cancelled."""
        task_status.started()
        while True:
            await self.look()
            await trio.sleep(PERIOD)

    async def look(self) -> None:
        """Truncate the log if it is larger than it need be and nobody reads from it. Warn if it is large."""
        if self._size() > SQLITE_LOG_KEPT:
            await trio.to_thread.run_sync(self._cut, limiter=self._thread)
        size = self._size()
        metrics.SQLITE_LOG.set(size)
        if (size > LARGE) is not self._large:
            self._large = size > LARGE
            if self._large:
                advice = "another process has a long read open: find it with fuser or lsof, and end it"
                log.warning("sqlite_log_grows", file=str(self._file), bytes=size, advice=advice)
            else:
                log.info("sqlite_log_is_small", bytes=size)

    def _size(self) -> int:
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

    def _cut(self) -> None:
        """Truncate the log without blocking anybody.

        PASSIVE copies the log into the file while others write. TRUNCATE follows only if everything was copied,
        and with a busy timeout of 0, so that it does not wait for readers.
        """
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
        except (SQLAlchemyError, sqlite3.Error) as error:  # the writer reports the same problem as a warning
            log.debug("sqlite_log_not_cut", error=type(error).__name__)
