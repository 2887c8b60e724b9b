"""The file of an SQLite database, watched: what is written into one that has gone is lost at the next start.

SQLite itself goes on with a file that was deleted, or moved away for another, for as long as it has it open.
It finds the log beside it (`-wal`) by its name alone: whoever opens the new file plays the old log into it.

`cp` puts another database into the very same file, and SQLite would write pages of the old one between those of
the new. So the header says which file this is: `application_id` is random for each database and each copy that
chatd makes, and `user_version` grows with each start. An older one came from somewhere else.
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
from chatd.store.private import PRIVATE

Identity = tuple[int, int]
# Of the file's first page (https://www.sqlite.org/fileformat2.html): magic, user_version, application_id.
_HEADER = struct.Struct(">16s44xI4xI")
_MAGIC = b"SQLite format 3\0"
ADVICE = "stop chatd, look at the file with `chatd doctor`, and put a backup in its place: `chatd restore`"

log = structlog.get_logger()
_damaged = Recurring("database_damaged")


class Stamp(NamedTuple):
    generation: int
    lineage: int


class DatabaseFile:
    """The file that was under the name when this was made. For PostgreSQL there is nothing to watch."""

    def __init__(self, url: str) -> None:
        parsed = urls.parse(url)
        named = parsed.database if parsed.get_backend_name() == "sqlite" else None
        self._path = Path(named).absolute() if named else None
        self._identity = _identity(self._path) if self._path is not None else None
        self._log: Identity | None = None
        self._stamps: tuple[Stamp | None, Stamp] | None = None  # of the file at our start; ours
        self._descriptor: int | None = None
        self._written: tuple[int, int] | None = None  # when the file was written last, and its size
        self.damaged = False  # SQLite has said so since the start

    def stamp(self, engine: Engine) -> None:
        """Begin to serve from it: a copy that was made before has an older stamp from now on."""
        if self._path is None:
            return
        with engine.begin() as connection:
            generation = connection.exec_driver_sql("PRAGMA user_version").scalar_one() + 1
            lineage = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            lineage = lineage or secrets.randbelow(2**31 - 1) + 1
            connection.exec_driver_sql(f"PRAGMA user_version = {generation}")
            connection.exec_driver_sql(f"PRAGMA application_id = {lineage}")
        with closing(engine.raw_connection()) as pooled:  # into the file itself, if no reader is in the way
            pooled.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
        # One descriptor for as long as SQLite has the file open: to close any descriptor of a file ends all
        # POSIX locks that the process holds on it (https://www.sqlite.org/howtocorrupt.html §2.2). Another
        # process would then take itself for the last, and delete the log of a database that is in use.
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamps = _stamp_of(self._descriptor), Stamp(generation, lineage)

    def close(self) -> None:
        """Call it when no engine has a connection any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Raises DatabaseGone. Takes microseconds, or as long as the file system does."""
        if self._path is None or self._identity is None:
            return
        found = _stat(self._path)
        if found is None:
            raise self._gone("has been deleted or moved away")
        if (found.st_dev, found.st_ino) != self._identity:
            raise self._gone("was replaced by another file")
        if self._is_overwritten(found):
            raise self._gone("was overwritten with another database (by cp, for example)")
        self._log = _identity(_beside(self._path, "-wal"))

    def _gone(self, what: str) -> DatabaseGone:
        return DatabaseGone(
            f"The database {self._path} {what} while chatd was serving from it. Nothing more is acknowledged;"
            " the next start serves from the file that is there then."
        )

    def _is_overwritten(self, found: os.stat_result) -> bool:
        """In WAL mode SQLite itself seldom writes to the file, so its header is seldom read here."""
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
        """Let no connection of an engine's open another file, make one, or write into what has come for it."""
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
        """Bring what is in the log into the file that has gone, for somebody may have moved it away and need
        it, and move the log out of the way of the file that came for it."""
        if self._path is None:
            return
        wal, left = _beside(self._path, "-wal"), _beside(self._path, "-wal.left")
        if self._log is None or _identity(wal) != self._log:
            return  # it is another file's already
        with suppress(OSError):
            if _identity(self._path) == self._identity:  # overwritten: it must not come into what is there now
                left.touch(PRIVATE)
                shutil.copyfile(wal, left)
                os.truncate(wal, 0)  # connections that are still open would bring it there
                wal.unlink()
                log.error("log_left", file=str(left), reason="the database that it belongs to was overwritten")
            elif _empty_log(engine):
                wal.unlink()
            else:
                wal.replace(left)
                log.error("log_left", file=str(left), reason="it could not be written into the database")
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


def _stamp_of(descriptor: int) -> Stamp | None:
    """None where the file is no SQLite database."""
    start = os.pread(descriptor, _HEADER.size, 0)
    if len(start) < _HEADER.size:
        return None
    magic, *stamp = _HEADER.unpack(start)
    return Stamp(*stamp) if magic == _MAGIC else None


def _identity(path: Path) -> Identity | None:
    found = _stat(path)
    return None if found is None else (found.st_dev, found.st_ino)


def _stat(path: Path) -> os.stat_result | None:
    """None where there is no such file. Other errors of a file system say nothing about the file."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
