"""Checks that a database belongs to chatd, or is free for it, before chatd changes anything in it.

The database of another application has tables that chatd did not create. Some may have the names of chatd's
tables, and Alembic may keep a version there. An SQLite file must be chatd's alone. A PostgreSQL database may
have other tables, if their names are not those of chatd's.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, Inspector, inspect

from chatd.core.errors import ConfigError
from chatd.store import migrations, schema
from chatd.store.engine import is_sqlite, untouched_engine

# Columns of the first migration, which no later one drops. A table without them is not chatd's.
_OURS = {
    "chat_conversations": {"id", "last_seq", "low_seq"},
    "chat_messages": {"id", "chat_conversation_id", "user_id", "seq", "request_hash"},
    "chat_meta": {"key", "value"},
}
_NAMED = 3  # foreign tables that the error names


def require_own_file(file: Path) -> None:
    """Raises ConfigError if the SQLite file belongs to another application. Changes and creates no file."""
    if not file.is_file():
        return
    engine = untouched_engine(file)
    try:
        _require_own(engine, f"{file} belongs to another application", "name another file")
    finally:
        engine.dispose()


def require_own_database(engine: Engine) -> None:
    """The same for PostgreSQL."""
    name = f"the PostgreSQL database {engine.url.database} belongs to another application"
    _require_own(engine, name, "create a database for chatd and name that")


def _require_own(engine: Engine, finding: str, advice: str) -> None:
    # One snapshot: another node may be migrating.
    snapshot = engine if is_sqlite(engine) else engine.execution_options(isolation_level="REPEATABLE READ")
    with snapshot.connect() as connection:
        foreign = _foreign_tables(connection)
    if foreign:
        tables = f"tables {', '.join(foreign[:_NAMED])}" + (", …" if len(foreign) > _NAMED else "")
        raise ConfigError(f"database.url: {finding} (chatd did not create its {tables}); {advice}.")


def _foreign_tables(connection: Connection) -> list[str]:
    """The tables that show that this is not chatd's database; empty if it is, or may become so."""
    inspector = inspect(connection)
    there = {*inspector.get_table_names(), *inspector.get_view_names()} - {migrations.VERSION_TABLE}
    if migrations.current(connection) is None:
        return sorted(there if connection.dialect.name == "sqlite" else there & set(schema.metadata.tables))
    wrong = [name for name in _OURS if not _has_columns(inspector, name, there)]
    return wrong and ([name for name in wrong if name in there] or sorted(there) or [migrations.VERSION_TABLE])


def _has_columns(inspector: Inspector, name: str, there: set[str]) -> bool:
    return name in there and {column["name"] for column in inspector.get_columns(name)} >= _OURS[name]
