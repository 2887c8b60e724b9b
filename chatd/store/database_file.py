"""The file of an SQLite database, watched: what is written into one that has gone is lost at the next start.

SQLite itself goes on with a file that was deleted, or moved away for another, for as long as it has it open.
It finds the log beside it (`-wal`) by its name alone: whoever opens the new file plays the old log into it.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import DatabaseGone
from chatd.store import urls
from chatd.store.engine import is_sqlite

Identity = tuple[int, int]
log = structlog.get_logger()


class DatabaseFile:
    """The file that was under the name when this was made. For PostgreSQL there is nothing to watch."""

    def __init__(self, url: str) -> None:
        parsed = urls.parse(url)
        named = parsed.database if parsed.get_backend_name() == "sqlite" else None
        self._path = Path(named).absolute() if named else None
        self._identity = _identity(self._path) if self._path is not None else None
        self._log: Identity | None = None

    def check(self) -> None:
        """Raises DatabaseGone. Takes microseconds, or as long as the file system does."""
        if self._path is None or self._identity is None:
            return
        found = _identity(self._path)
        if found == self._identity:
            self._log = _identity(_beside(self._path, "-wal"))
            return
        what = "has been deleted or moved away" if found is None else "was replaced by another file"
        raise DatabaseGone(
            f"The database {self._path} {what} while chatd was serving from it. Nothing more is acknowledged;"
            " the next start serves from the file that is there then."
        )

    def guard(self, engine: Engine) -> None:
        """Let no connection of an engine's open another file, or make one."""
        if is_sqlite(engine):
            event.listen(engine, "do_connect", self._refuse)
            event.listen(engine, "connect", self._refuse)

    def _refuse(self, *_: Any) -> None:
        try:
            self.check()
        except DatabaseGone as error:
            raise sqlite3.OperationalError(str(error)) from error

    def leave(self, engine: Engine) -> None:
        """Bring what is in the log into the file that has gone, for somebody may have moved it away and need
        it, and move the log out of the way of the file that came for it."""
        if self._path is None:
            return
        wal = _beside(self._path, "-wal")
        if self._log is None or _identity(wal) != self._log:
            return  # it is another file's already
        whole = _empty_log(engine)
        with suppress(OSError):
            if whole:
                wal.unlink()
            else:
                wal.replace(_beside(self._path, "-wal.left"))
                log.error("log_left", file=f"{wal}.left", reason="it could not be written into the database")
            _beside(self._path, "-shm").unlink()


def _empty_log(engine: Engine) -> bool:
    """Whether all of it is in the file. A new connection would be to another file: the pool has one."""
    try:
        with closing(engine.raw_connection()) as pooled:
            driver: Any = pooled.driver_connection
            return not driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except (SQLAlchemyError, sqlite3.Error):
        return False


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _identity(path: Path) -> Identity | None:
    """None where there is no such file. Other errors of a file system say nothing about the file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
