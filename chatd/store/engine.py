"""Builds SQLAlchemy's engines, one for writing and one for reading, with the settings that the guarantees need.

Each setting has its reason next to it.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from sqlalchemy import Connection, Engine, QueuePool, create_engine, event

from chatd.observe import metrics
from chatd.store import sessions, urls
from chatd.store.files import beside, file_of
from chatd.store.sessions import Sessions

# Seconds that chatd waits while another process holds SQLite's lock, before it answers `unavailable`.
SQLITE_BUSY_SECONDS = 5
# KiB of the writer's page cache. SQLite's default of 2 MiB is too small for the index pages of 300 busy rooms.
SQLITE_WRITER_CACHE = 16 * 1024
# Bytes that the file of the write-ahead log may keep after a checkpoint. Without this it never shrinks.
SQLITE_LOG_KEPT = 16 * 1024 * 1024

# Writing connections: of the writer, the outbox (which may wait for Redis), webhooks, retention and attendance.
# SQLite needs one more for checkpoints.
WRITING_SESSIONS = 5

_COMMON: dict[str, Any] = {
    "max_overflow": 0,
    "pool_timeout": 5,
    "hide_parameters": True,  # keeps the text of messages out of logged errors
    "json_serializer": lambda value: msgspec.json.encode(value).decode(),
    "json_deserializer": msgspec.json.decode,
}


def is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


def writing_engine(url: str, shared: Sessions | None = None) -> Engine:
    """An engine with one connection for each thread that writes, so the writer never waits for a connection.

    `shared` holds the sessions of other engines: after a failover, all of them end together.
    """
    engine = _engine(url, shared, name="write", pool_size=WRITING_SESSIONS + 1, isolation="READ COMMITTED")
    if is_sqlite(engine):
        # A plain BEGIN would fail at its first write, without waiting, if another process
        # wrote in the meantime.
        _begin_with(engine, "BEGIN IMMEDIATE")
        event.listen(engine, "connect", _set_up_sqlite_writer)
    return engine


def reading_engine(url: str, readers: int, shared: Sessions | None = None) -> Engine:
    """An engine whose transactions see one snapshot, so that rights, head and missed changes fit together."""
    engine = _engine(url, shared, name="read", pool_size=readers, isolation="REPEATABLE READ")
    if is_sqlite(engine):
        _begin_with(engine, "BEGIN")
    return engine


def looking_engine(url: str) -> Engine:
    """A read-only engine for commands. It creates no file and does not change SQLite's journal mode."""
    file = file_of(url)
    if file is None:
        engine = _engine(url, None, name="read", pool_size=1, isolation="REPEATABLE READ")
        return engine.execution_options(postgresql_readonly=True)
    return _file_engine(file, "mode=ro")


def untouched_engine(file: Path) -> Engine:
    """A read-only engine for a file that may belong to another application. It leaves no new file next to it.

    An existing log belongs to the database and must be read with it. If there is none, no process has the file
    open in WAL mode, and `immutable=1` keeps SQLite from creating a log.
    """
    logs = (beside(file, suffix) for suffix in ("-wal", "-journal"))
    return _file_engine(file, "mode=ro" if any(log.exists() for log in logs) else "immutable=1")


def _file_engine(file: Path, how: str) -> Engine:
    place = f"{file.absolute().as_uri()}?{how}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(place, uri=True, timeout=SQLITE_BUSY_SECONDS, isolation_level=None)

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, **_COMMON)
    _begin_with(engine, "BEGIN")
    return engine


def _engine(url: str, shared: Sessions | None, *, name: str, pool_size: int, isolation: str) -> Engine:
    engine = _create(url, shared or Sessions(), pool_size, isolation)
    count = metrics.STATEMENTS.labels(name).inc
    event.listen(engine, "before_cursor_execute", lambda *_: count())
    return engine


def _create(url: str, shared: Sessions, pool_size: int, isolation: str) -> Engine:
    parsed = urls.parse(url)
    common = {"pool_size": pool_size, **_COMMON}
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": SQLITE_BUSY_SECONDS}, **common)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "checkin", _end_transaction)
        return engine
    asked = sessions.connect_arguments(parsed.query)
    engine = create_engine(parsed, connect_args=asked, isolation_level=isolation, **common)
    # Insert many rows with one statement. psycopg would use a pipeline, in which
    # PostgreSQL's timeouts do not count.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    shared.watch(engine, partial(session_beside, engine, asked))
    return engine


def session_beside(engine: Engine, asked: dict[str, Any]) -> psycopg.Connection[Any]:
    """Open a session to PostgreSQL outside the engine's pool; `asked` are arguments for libpq."""
    _, parameters = engine.dialect.create_connect_args(engine.url)
    return psycopg.connect(**(dict(parameters) | asked))


def require_sessions(engine: Engine) -> None:
    """Raises OperatorError if a pooler in transaction mode stands before PostgreSQL."""
    asked = sessions.connect_arguments(engine.url.query)
    sessions.require_sessions(partial(session_beside, engine, asked))


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # else Python's sqlite3 begins transactions by itself
    # WAL: readers and the writer do not block each other. FULL: a commit is on disk when it returns (G1).
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _set_up_sqlite_writer(connection: Any, _record: Any) -> None:
    connection.execute(f"PRAGMA cache_size = -{SQLITE_WRITER_CACHE}")
    connection.execute(f"PRAGMA journal_size_limit = {SQLITE_LOG_KEPT}")
    connection.execute("PRAGMA secure_delete = ON")  # overwrites deleted rows with zeros, for erasure


def _end_transaction(connection: Any, _record: Any) -> None:
    if connection is not None and connection.in_transaction:  # its COMMIT failed, for example on a full disk
        connection.rollback()


def _begin_with(engine: Engine, statement: str) -> None:
    """Begin each transaction with `statement`, or with BEGIN on a connection with the option
    `only_reads` (`scans`).
    """

    def begin(connection: Connection) -> None:
        only_reads = connection.get_execution_options().get("only_reads")
        connection.exec_driver_sql("BEGIN" if only_reads else statement)

    event.listen(engine, "begin", begin)
