"""Engines: one that writes, one that reads, with the settings that the guarantees rest on.

Every setting has its reason beside it. Used by the writer, the reads, the outbox and the migrations.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from sqlalchemy import Connection, Engine, create_engine, event

from chatd.observe import metrics
from chatd.store import sessions, urls
from chatd.store.sessions import Sessions

# A foreign process may hold SQLite's lock (a backup, say) for so long before we answer `unavailable`.
SQLITE_BUSY_SECONDS = 5
# KiB that the writer keeps of the file: SQLite's own 2 MiB do not hold the index ends of 300 busy rooms.
SQLITE_WRITER_CACHE = 16 * 1024
# Bytes of its log's file that stay when the log begins anew: it would keep the size that it once had for ever.
SQLITE_LOG_KEPT = 16 * 1024 * 1024

# Connections that write: the writer's, the outbox's, which may wait for Redis, and those of webhooks, retention
# and attendance. SQLite has one more, for its log.
WRITING_SESSIONS = 5

_COMMON: dict[str, Any] = {
    "max_overflow": 0,
    "pool_timeout": 5,
    "hide_parameters": True,  # an error in the log tells no message's text
    "json_serializer": lambda value: msgspec.json.encode(value).decode(),
    "json_deserializer": msgspec.json.decode,
}


def is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


def writing_engine(url: str, shared: Sessions | None = None) -> Engine:
    """Each has a thread of its own, so the writer never waits for a connection.

    `shared`: the sessions of another engine, which end together with this one's.
    """
    engine = _engine(url, shared, name="write", pool_size=WRITING_SESSIONS + 1, isolation="READ COMMITTED")
    if is_sqlite(engine):
        # A deferred transaction that turns into a write fails at once when another wrote meanwhile.
        _begin_with(engine, "BEGIN IMMEDIATE")
        event.listen(engine, "connect", _set_up_sqlite_writer)
    return engine


def reading_engine(url: str, readers: int, shared: Sessions | None = None) -> Engine:
    """Every transaction is one snapshot: rights, head and missed changes belong together."""
    engine = _engine(url, shared, name="read", pool_size=readers, isolation="REPEATABLE READ")
    if is_sqlite(engine):
        _begin_with(engine, "BEGIN")
    return engine


def looking_engine(url: str) -> Engine:
    """For commands that only look: it cannot write, makes no file, leaves SQLite its journal mode."""
    parsed = urls.parse(url)
    if parsed.get_backend_name() != "sqlite":
        engine = _engine(url, None, name="read", pool_size=1, isolation="REPEATABLE READ")
        return engine.execution_options(postgresql_readonly=True)
    place = f"{Path(parsed.database or '').absolute().as_uri()}?mode=ro"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(place, uri=True, timeout=SQLITE_BUSY_SECONDS, isolation_level=None)

    engine = create_engine(parsed, creator=connect, pool_size=1, **_COMMON)
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
    # Many rows make one statement: psycopg would send a pipeline of many, within which no deadline counts.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    shared.watch(engine, partial(session_beside, engine, asked))
    return engine


def session_beside(engine: Engine, asked: dict[str, Any]) -> psycopg.Connection[Any]:
    """A session of PostgreSQL that belongs to no pool."""
    _, parameters = engine.dialect.create_connect_args(engine.url)
    return psycopg.connect(**(dict(parameters) | asked))


def require_sessions(engine: Engine) -> None:
    """Raises OperatorError where a pooler keeps no sessions."""
    asked = sessions.connect_arguments(engine.url.query)
    sessions.require_sessions(partial(session_beside, engine, asked))


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # sqlite3 would begin transactions by rules of its own
    # WAL: readers and the writer do not wait for each other. FULL: a commit is on the disk (G1).
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _set_up_sqlite_writer(connection: Any, _record: Any) -> None:
    connection.execute(f"PRAGMA cache_size = -{SQLITE_WRITER_CACHE}")
    connection.execute(f"PRAGMA journal_size_limit = {SQLITE_LOG_KEPT}")
    connection.execute("PRAGMA secure_delete = ON")  # zeros over what is deleted, as is Debian's default


def _end_transaction(connection: Any, _record: Any) -> None:
    if connection is not None and connection.in_transaction:  # its COMMIT failed: the disk was full, say
        connection.rollback()


def _begin_with(engine: Engine, statement: str) -> None:
    """`only_reads` is an option of a connection (see `scans`)."""

    def begin(connection: Connection) -> None:
        only_reads = connection.get_execution_options().get("only_reads")
        connection.exec_driver_sql("BEGIN" if only_reads else statement)

    event.listen(engine, "begin", begin)
