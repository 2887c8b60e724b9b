"""Examines a database for `chatd doctor`: its version, whether it accepts writes, and how fast.

It leaves nothing behind: it rolls inserts back, and its commits write to PostgreSQL's log only.
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
from chatd.store import migrations, schema
from chatd.store.engine import looking_engine, require_sessions, writing_engine
from chatd.store.failures import is_damage
from chatd.store.files import file_of

SYNCHRONOUS = "synchronous_standby_names"
COMMITS = 20  # commits to measure; their median counts
BLOCK = 4096  # bytes, the least that a commit of SQLite writes
CHECK_SECONDS = 5.0  # limit of the check of SQLite's file, enough for about 2 GB
CHECK_STEPS = 10_000  # instructions of SQLite's virtual machine between two checks of that limit


@dataclass(frozen=True)
class Found:
    """The result of `look`.

    `refuses_writes`: why the database accepts no rows; empty if it does. `commit`: seconds of a commit.
    `ahead`: seconds by which the database's clock is ahead of ours. `settings`: PostgreSQL's settings.
    `standbys`: the number of connected standbys. `damage`: SQLite's report about its file, empty if the file is
    intact; None if the check took too long.
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
    """SQLite cannot read its file at all."""


def look(config: Database) -> Found:
    """Examine the database. Raises OperatorError if it cannot be opened. Creates no database."""
    file = file_of(config.url)
    if file is not None and not file.exists():
        raise OperatorError(f"the file {file} does not exist yet")
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
    """Examine SQLite's file. Tests a write only if the schema is ours; keeps the journal mode."""
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
    """The report of SQLite's quick_check; empty: no damage; None: the check took longer than `seconds`."""
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
    waits = settings[SYNCHRONOUS] and not standbys  # a commit would wait for a standby for ever
    writing = writing_engine(config.url)
    try:
        refused = _refusal(writing) if revision == newest else ""
        commit = None if refused or waits else _commit_time(writing)
    finally:
        writing.dispose()
    return Found(f"PostgreSQL {version}", revision, newest, refused, commit, ahead, settings, standbys)


def _refusal(engine: Engine) -> str:
    """Why PostgreSQL accepts no rows; empty if it does."""
    try:
        with engine.connect() as connection:
            connection.execute(insert(schema.facts), {"key": "doctor", "value": ""})
            connection.rollback()
    except SQLAlchemyError as error:
        return _first_line(error)
    return ""


def fsync_time(directory: Path) -> float:
    """Median seconds to write and sync one block in a directory. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file:

        def write() -> None:
            file.write(b"\0" * BLOCK)
            file.flush()
            os.fsync(file.fileno())

        return median(_timed(write) for _ in range(COMMITS))


def _commit_time(engine: Engine) -> float | None:
    """Median seconds of a commit that waits for the disk; None if this role may not call
    pg_logical_emit_message.

    The transaction writes a logical message to PostgreSQL's log, so it needs no table.
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
