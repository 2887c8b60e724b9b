"""Reads the original table from another database, with one query, in the order of the ids."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Engine,
    MetaData,
    Select,
    Table,
    Text,
    cast,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import ConfigError, OperatorError
from chatd.store import urls
from chatd.store.engine import untouched_engine
from chatd.store.failures import primary
from chatd.store.files import file_of, resolved
from chatd.store.imports.records import OPTIONAL, REQUIRED, Record

MYSQL = ("mysql", "mariadb")
FETCH = 2000  # rows that the client holds at once
IDS = ("id", "chat_conversation_id", "user_id", "reply_to")


class DatabaseTable:
    noun = "row"

    def __init__(self, url: str, table: str) -> None:
        """Raises OperatorError, also if there is no driver for the database."""
        self._url, self._table = _parsed(url), table
        self._name = self._url.render_as_string(hide_password=True)
        self._engine = self._open()
        self._read = 0
        with self._as_operator_errors():
            self._columns = self._found()
            with self._engine.connect() as connection:
                self._rows = connection.scalar(select(func.count()).select_from(self._typed())) or 0

    @property
    def ignored(self) -> list[str]:
        return sorted(set(self._columns) - {*REQUIRED, *OPTIONAL})

    def close(self) -> None:
        self._engine.dispose()

    def share(self) -> float | None:
        return self._read / self._rows if self._rows else None

    def records(self) -> Iterator[Record]:
        with self._as_operator_errors(), self._engine.connect() as connection:
            streamed = connection.execution_options(stream_results=True, yield_per=FETCH)
            for place, row in enumerate(streamed.execute(self._query()).mappings(), 1):
                self._read = place
                yield Record(place, dict(row))

    def is_at(self, url: str) -> bool:
        """Whether this is the database at `url`."""
        other = urls.parse(url)
        if self._engine.dialect.name == other.get_backend_name() == "sqlite":
            return resolved(Path(self._url.database or "")) == file_of(url)
        places = {(one.get_backend_name(), one.host, one.port, one.database) for one in (self._url, other)}
        return len(places) == 1

    def _found(self) -> list[str]:
        inspector = inspect(self._engine)
        if self._table not in (*inspector.get_table_names(), *inspector.get_view_names()):
            raise OperatorError(f"{self._name}: there is no table {self._table}. Name another with --table.")
        found = [column["name"] for column in inspector.get_columns(self._table)]
        missing = [name for name in REQUIRED if name not in found]
        if missing:
            raise OperatorError(f"{self._name}: the table {self._table} has no column {', '.join(missing)}.")
        return found

    def _typed(self) -> Table:
        wanted = [name for name in (*REQUIRED, *OPTIONAL) if name in self._columns]
        columns = [Column(name, BigInteger if name in IDS else Text) for name in wanted]
        return Table(self._table, MetaData(), *columns)

    def _query(self) -> Select[Any]:
        """Dates and JSON as text: so all databases give the same, and zero dates reach us."""
        table = self._typed()
        texts = [one if one.name in IDS else cast(one, Text).label(one.name) for one in table.c]
        return select(*texts).order_by(table.c.id)

    def _open(self) -> Engine:
        if self._url.get_backend_name() != "sqlite":
            return _server(self._url, self._table)
        file = resolved(Path(self._url.database or ""))
        if not file.is_file():
            raise OperatorError(f"{self._name}: there is no such file.")
        engine = untouched_engine(file)
        event.listen(engine, "connect", _keep_bad_bytes)
        return engine

    @contextmanager
    def _as_operator_errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, psycopg.Error, sqlite3.Error) as error:
            why = primary(error) or str(getattr(error, "orig", error)).strip().splitlines()[0]
            raise OperatorError(f"{self._name}: {why}") from error


def _parsed(url: str) -> URL:
    try:
        parsed = urls.parse(url)
    except ConfigError:
        raise OperatorError(
            "SOURCE is not the URL of a database. Write sqlite:///… or postgresql://…"
        ) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql", *MYSQL):
        raise OperatorError(
            f"SOURCE: chatd does not read {parsed.get_backend_name()}://. Write sqlite:///…, postgresql://… or"
            " mysql://…, or export the table to a file."
        )
    return parsed


def _server(url: URL, table: str) -> Engine:
    """Not with chatd's own timeouts: the query is idle while a batch is written."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "hide_parameters": True}
    for driver in (url.drivername, "mysql+pymysql") if url.drivername in MYSQL else (url.drivername,):
        try:
            return create_engine(url.set(drivername=driver), **options)
        except ImportError:
            continue
    raise OperatorError(
        "chatd has no driver for MySQL here. Write the table to a file, and import that:\n\n"
        f"  {export_command(url, table)}\n  chatd import {table}.jsonl"
    )


def export_command(url: URL, table: str) -> str:
    """A shell command that writes the table as JSON lines. It asks for the password.

    `--raw` keeps the escapes of JSON as they are. The session's time zone stays the server's, because Laravel
    writes and reads its dates in that one.
    """
    pairs = ", ".join(f"'{name}', {name}" for name in REQUIRED)
    query = f"SELECT JSON_OBJECT({pairs}) FROM {table} ORDER BY id"
    place = [f"--host={url.host or '127.0.0.1'}", *([f"--port={url.port}"] if url.port else [])]
    login = [f"--user={url.username}"] if url.username else []
    form = ["--batch", "--raw", "--quick", "--skip-column-names", "--default-character-set=utf8mb4"]
    words = ["mysql", *place, *login, "--password", *form, url.database or "laravel", "--execute"]
    return f'{shlex.join(words)} "{query}" > {shlex.quote(f"{table}.jsonl")}'


def _keep_bad_bytes(connection: Any, _record: Any) -> None:
    """Let a text that is not UTF-8 reach the import, which names its row."""
    connection.text_factory = lambda value: value.decode("utf-8", "surrogateescape")
