"""Watches the file of an SQLite database, so that chatd acknowledges no write into a file that is gone.

SQLite keeps using an open file that was deleted or moved away; all that it writes there is lost at the next
start. SQLite also finds the write-ahead log (`-wal`) by its name only: the process that opens a new file under
the old name would apply the old log to it.

`cp` overwrites the same file with another database, and SQLite would mix pages of both. To notice that, chatd
stamps the header: `application_id` is random for each database and for each copy that chatd makes, and each
start adds one to `user_version`. A file with another id or a smaller version is not the one that chatd opened.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Engine, ExceptionContext, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from chatd.core.errors import DatabaseGone
from chatd.observe.logs import Recurring
from chatd.store import urls
from chatd.store.engine import is_sqlite
from chatd.store.failures import is_damage, primary
from chatd.store.files import beside, file_of
from chatd.store.private import PRIVATE

Identity = tuple[int, int]
# The start of the file (https://www.sqlite.org/fileformat2.html): magic, user_version, application_id.
_HEADER = struct.Struct(">16s44xI4xI")
_MAGIC = b"SQLite format 3\0"
ADVICE = "stop chatd, check the file with `chatd doctor`, and replace it with a backup: `chatd restore`"

log = structlog.get_logger()
_damaged = Recurring("database_damaged")


class Stamp(NamedTuple):
    generation: int
    lineage: int


class DatabaseFile:
    """The file that had the database's name at the start. Does nothing for PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._name = Path(urls.parse(url).database or "").absolute()  # may be a link, which may change
        self._path = file_of(url)  # where SQLite has the file and the log
        self._identity = _identity(self._path) if self._path is not None else None
        self._log: Identity | None = None
        self._stamps: tuple[Stamp | None, Stamp] | None = None  # (in the file at the start, of this start)
        self._descriptor: int | None = None
        self._written: tuple[int, int] | None = None  # the file's (mtime in ns, size) at the last check
        self.damaged = False  # whether SQLite has reported damage since the start

    def stamp(self, engine: Engine) -> None:
        """Give the file a new stamp, so that every copy made before this start has an older one."""
        if self._path is None:
            return
        with engine.begin() as connection:
            generation = connection.exec_driver_sql("PRAGMA user_version").scalar_one() + 1
            lineage = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            lineage = lineage or secrets.randbelow(2**31 - 1) + 1
            connection.exec_driver_sql(f"PRAGMA user_version = {generation}")
            connection.exec_driver_sql(f"PRAGMA application_id = {lineage}")
        # Move the stamp from the log to the file, if there is room on the disk.
        with suppress(sqlite3.Error), closing(engine.raw_connection()) as pooled:
            pooled.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
        # Keep one descriptor as long as SQLite has the file open. If a process closes any descriptor of a file,
        # it loses all its POSIX locks on it (https://www.sqlite.org/howtocorrupt.html §2.2). Another process
        # would then believe that nobody else uses the database, and delete the log.
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamps = _stamp_of(self._descriptor), Stamp(generation, lineage)

    def close(self) -> None:
        """Close the descriptor. Call this only after the engines have closed all connections: see `stamp`."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Raises DatabaseGone if the file was deleted, replaced or overwritten. Costs one `stat`."""
        if self._path is None or self._identity is None:
            return
        found = _stat(self._name)
        if found is None:
            raise self._gone("has been deleted or moved away")
        if (found.st_dev, found.st_ino) != self._identity:
            raise self._gone("was replaced by another file")
        if self._is_overwritten(found):
            raise self._gone("was overwritten with another database (by cp, for example)")
        self._log = _identity(beside(self._path, "-wal"))

    def _gone(self, what: str) -> DatabaseGone:
        return DatabaseGone(
            f"The database {self._name} {what} while chatd was using it. chatd acknowledges no more writes;"
            " the next start uses the file that has this name then."
        )

    def _is_overwritten(self, found: os.stat_result) -> bool:
        """Whether the header has a foreign stamp. Reads it only if the file was written since the last check.

        That is rare: in WAL mode SQLite writes to the file only at checkpoints.
        """
        written = found.st_mtime_ns, found.st_size
        if self._stamps is None or self._descriptor is None or written == self._written:
            return False
        at_start, ours = self._stamps
        stamp = _stamp_of(self._descriptor)
        if stamp != at_start and (stamp is None or stamp.lineage != ours.lineage or stamp < ours):
            return True
        self._written = written
        return False

    def guard(self, engine: Engine) -> None:
        """Make the engine check the file before each connect and commit, so that it never uses another file."""
        if is_sqlite(engine):
            event.listen(engine, "do_connect", self._refuse)
            event.listen(engine, "connect", self._refuse)
            event.listen(engine, "commit", self._refuse_commit)
            event.listen(engine, "handle_error", self._listen_for_damage)

    def _listen_for_damage(self, context: ExceptionContext) -> None:
        if is_damage(context.original_exception):
            self.damaged = True
            _damaged.warn(file=str(self._path), error=primary(context.original_exception), advice=ADVICE)

    def _refuse(self, *_: Any) -> None:
        try:
            self.check()
        except DatabaseGone as error:
            raise sqlite3.OperationalError(str(error)) from error

    def _refuse_commit(self, _: Any) -> None:
        try:
            self._refuse()
        except sqlite3.OperationalError as error:
            raise OperationalError("COMMIT", None, error) from error

    def leave(self, engine: Engine) -> None:
        """Stop using a file that is gone: save the log, and remove it from the name where the new file would
        use it.

        If the old file still exists somewhere (moved away), the log's content goes into it, since somebody may
        need it. Otherwise the log is kept as `-wal.left`.
        """
        if self._path is None:
            return
        wal, left = beside(self._path, "-wal"), beside(self._path, "-wal.left")
        if self._log is None or _identity(wal) != self._log:
            return  # the log under this name belongs to another file already
        in_place = _identity(self._path) == self._identity
        if in_place and _identity(self._name) != self._identity:
            return  # only a link to the file has changed: the file and its log belong together
        with suppress(OSError):
            if in_place:
                # The file was overwritten. The log must not be applied to its new content.
                left.touch(PRIVATE)
                shutil.copyfile(wal, left)
                os.truncate(wal, 0)  # connections that are still open would apply it when they close
                wal.unlink()
                log.error("log_left", file=str(left), reason="the database that it belongs to was overwritten")
            elif _empty_log(engine):
                wal.unlink()
            else:
                wal.replace(left)
                log.error("log_left", file=str(left), reason="it could not be written into the database")
            beside(self._path, "-shm").unlink()


def _empty_log(engine: Engine) -> bool:
    """Move the whole log into the file; whether that worked.

    It takes a connection from the pool, because a new one would open another file.
    """
    try:
        with closing(engine.raw_connection()) as pooled:
            driver: Any = pooled.driver_connection
            return not driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except (SQLAlchemyError, sqlite3.Error):
        return False


def _stamp_of(descriptor: int) -> Stamp | None:
    """The stamp in the file's header; None if the file is not an SQLite database."""
    start = os.pread(descriptor, _HEADER.size, 0)
    if len(start) < _HEADER.size:
        return None
    magic, *stamp = _HEADER.unpack(start)
    return Stamp(*stamp) if magic == _MAGIC else None


def _identity(path: Path) -> Identity | None:
    found = _stat(path)
    return None if found is None else (found.st_dev, found.st_ino)


def _stat(path: Path) -> os.stat_result | None:
    """None if the file does not exist. Raises other OSErrors, which do not mean that the file is gone."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
