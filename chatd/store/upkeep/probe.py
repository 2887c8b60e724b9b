"""A look at the database from outside, for `chatd doctor`: what it is, whether it writes, how fast.

Nothing is left behind: what is inserted is rolled back, what is committed writes to the log alone.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psycopg
from sqlalchemy import Connection, Engine, insert
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.store import migrations, schema, urls
from chatd.store.engine import looking_engine, require_sessions, writing_engine
from chatd.store.failures import is_damage

SYNCHRONOUS = "synchronous_standby_names"
COMMITS = 20  # of which the middle one counts
BLOCK = 4096  # bytes, as a commit of SQLite writes at least
CHECK_SECONDS = 5.0  # for a look at all of SQLite's file, some 2 GB
CHECK_STEPS = 10_000  # of SQLite's machine, between looks at the clock


@dataclass(frozen=True)
class Found:
    """`commit` is in seconds, `ahead` how far its clock is ahead of ours. `settings` are PostgreSQL's, and
    `standbys` the number of servers that follow it just now. `damage` is what SQLite says of its file, empty
    where that is whole; None where there was no time to read all of it.
    """

    version: str
    revision: str | None
    newest: str
    refuses_writes: str = ""
    commit: float | None = None
    ahead: float | None = None
    settings: dict[str, str] | None = None
    standbys: int = 0
    damage: str | None = None


class Damaged(OperatorError):
    """SQLite cannot even begin to read its file."""


def sqlite_file(config: Database) -> Path | None:
    """Where SQLite's file is, or is to be; None for PostgreSQL."""
    url = urls.parse(config.url)
    return Path(url.database or "").absolute() if url.get_backend_name() == "sqlite" else None


def look(config: Database) -> Found:
    """Raises OperatorError with a sentence where there is nothing to look at. Creates no database."""
    file = sqlite_file(config)
    if file is not None and not file.exists():
        raise OperatorError(f"there is no {file} yet")
    try:
        reading = looking_engine(config.url)
        try:
            return _look_at_file(reading, file) if file is not None else _look_at_server(reading, config)
        finally:
            reading.dispose()
    except (SQLAlchemyError, psycopg.Error, TypeError, ValueError) as error:
        kind = Damaged if is_damage(getattr(error, "orig", None)) else OperatorError
        raise kind(_first_line(error)) from error


def _look_at_file(reading: Engine, file: Path) -> Found:
    """It is asked whether it takes rows only if it is ours, and stays in the journal mode that it has."""
    with reading.connect() as connection:
        revision = migrations.current(connection)
    newest = migrations.head()
    refused = _refusal_of_file(file) if revision == newest else ""
    return Found(
        f"SQLite {sqlite3.sqlite_version}",
        revision,
        newest,
        refused,
        fsync_time(file.parent),
        damage=damage_of(file),
    )


def damage_of(file: Path, seconds: float = CHECK_SECONDS) -> str | None:
    """What SQLite's quick_check says, empty where all is well; None where it took longer than that."""
    end = time.monotonic() + seconds
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > end, CHECK_STEPS)
        try:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.Error as error:
            return None if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT else str(error)
    return "" if found == "ok" else str(found)


def _refusal_of_file(file: Path) -> str:
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO chat_meta VALUES ('doctor', '')")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        return str(error)
    return ""


def _look_at_server(reading: Engine, config: Database) -> Found:
    require_sessions(reading)
    with reading.connect() as connection:
        revision = migrations.current(connection)
    newest = migrations.head()
    with reading.connect() as connection:
        version = str(connection.exec_driver_sql("SHOW server_version").scalar()).split()[0]
        names = ("fsync", "synchronous_commit", "full_page_writes", "max_connections", SYNCHRONOUS)
        settings = {name: str(connection.exec_driver_sql(f"SHOW {name}").scalar()) for name in names}
        ahead = _ahead(connection)
        standbys = int(connection.exec_driver_sql("SELECT count(*) FROM pg_stat_replication").scalar() or 0)
    waits = settings[SYNCHRONOUS] and not standbys  # for a standby, and for ever
    writing = writing_engine(config.url)
    try:
        refused = _refusal(writing) if revision == newest else ""
        commit = None if refused or waits else _commit_time(writing)
    finally:
        writing.dispose()
    return Found(f"PostgreSQL {version}", revision, newest, refused, commit, ahead, settings, standbys)


def _refusal(engine: Engine) -> str:
    """Why it takes no rows; empty where it does."""
    try:
        with engine.connect() as connection:
            connection.execute(insert(schema.facts), {"key": "doctor", "value": ""})
            connection.rollback()
    except SQLAlchemyError as error:
        return _first_line(error)
    return ""


def fsync_time(directory: Path) -> float:
    """Seconds that a block takes to the disk, in the middle of some. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file:

        def write() -> None:
            file.write(b"\0" * BLOCK)
            file.flush()
            os.fsync(file.fileno())

        return median(_timed(write) for _ in range(COMMITS))


def _commit_time(engine: Engine) -> float | None:
    """Seconds of a transaction that leaves a note in the log, which no table has, and waits for the disk.

    None where the note is forbidden.
    """

    def commit() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT pg_logical_emit_message(true, 'chatd', 'doctor')")

    try:
        return median(_timed(commit) for _ in range(COMMITS))
    except ProgrammingError:
        return None


def _ahead(connection: Connection) -> float:
    before = time.time()
    theirs = connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar()
    return float(theirs or 0) - (before + time.time()) / 2


def _timed(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
