"""Opens the database: checks or migrates the schema, makes the stored constants, builds the
writer and the reader.

The daemon calls `open_store` before it starts any task, so it reports every problem of the
database at the start.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import structlog
from sqlalchemy import Engine, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from chatd.config import Database
from chatd.core.errors import ConfigError, DatabaseAway, OperatorError
from chatd.core.model import Group
from chatd.store import migrations, schema, urls
from chatd.store.database_file import DatabaseFile
from chatd.store.engine import is_sqlite, looking_engine, reading_engine, require_sessions, writing_engine
from chatd.store.failures import is_unanswered, why_unanswered
from chatd.store.files import beside, file_of
from chatd.store.ownership import require_own_database, require_own_file
from chatd.store.private import keep_private
from chatd.store.queues.outbox import Outbox
from chatd.store.queues.presence import PresenceTable
from chatd.store.queues.webhooks import WebhookQueue
from chatd.store.read.reader import Reader
from chatd.store.sessions import Sessions
from chatd.store.upkeep import copies
from chatd.store.upkeep.retention import Pruning
from chatd.store.upkeep.wal import Wal
from chatd.store.write.writer import Writer

log = structlog.get_logger()


class Store:
    """The open database with its writer, reader and queues.

    `token_secret` signs tokens if the configuration has no secret.
    """

    def __init__(self, config: Database) -> None:
        sessions = self._sessions = Sessions()
        self._writing = writing_engine(config.url, sessions)
        self._reading = reading_engine(config.url, config.readers, sessions)
        self._file = DatabaseFile(config.url)
        for engine in (self._writing, self._reading):
            self._file.guard(engine)
        self.read = Reader(self._reading, config.readers, sessions.doubt)
        self.outbox = Outbox(self._writing)
        self.webhooks = WebhookQueue(self._writing)
        self.presence = PresenceTable(self._writing)
        self.retention = Pruning(self._writing)
        file = file_of(config.url)
        self.wal = Wal(self._writing, file) if file is not None else None
        self.token_secret = _make_facts(self._writing)
        self._file.stamp(self._writing)

    def writer(
        self, *, node: str | None, on_commit: Callable[[Group], None], wanted: frozenset[str] = frozenset()
    ) -> Writer:
        return Writer(
            self._writing,
            node=node,
            on_commit=on_commit,
            wanted=wanted,
            sessions=self._sessions,
            file=self._file,
            settled=self.outbox.settled,
        )

    def close(self) -> None:
        self._writing.dispose()
        self._reading.dispose()
        self._file.close()


def open_store(config: Database) -> Store:
    """Open the database. Migrates SQLite; PostgreSQL needs `chatd migrate`, because other nodes may use it.

    Raises OperatorError, which says what to change.
    """
    with opened(config) as engine:
        if is_sqlite(engine):
            _report(_upgrade(config, engine))
        else:
            _check_version(engine)
        return Store(config)


def migrate(config: Database) -> tuple[str | None, str]:
    """Migrate the schema to this version. Returns its revision before and after. Raises OperatorError."""
    with opened(config) as engine:
        revisions = _upgrade(config, engine)
        _make_facts(engine)  # so that `chatd token` works before the first start of a daemon
        return revisions


def token_secret(config: Database) -> str:
    """The secret in the database, which signs tokens if the configuration has none. Raises OperatorError."""
    facts = schema.facts
    with looked_at(config) as engine, engine.connect() as connection:
        found = connection.scalar(select(facts.c.value).where(facts.c.key == "token_secret"))
    if found is None:
        raise OperatorError(
            "database.url: no `chatd serve` has used this database yet, so no token would be valid."
        )
    return str(found)


@contextmanager
def looked_at(config: Database, *, newest: bool = False) -> Iterator[Engine]:
    """A read-only engine for the block. `newest`: the block needs the schema of this version.

    It creates, migrates and changes nothing. Raises OperatorError, also if the database is not one of chatd's.
    """
    require(config)
    with _as_operator_errors(config.url), _disposed(looking_engine(config.url)) as engine:
        with engine.connect() as connection:
            found = migrations.current(connection)
        if found is None:
            raise OperatorError(
                "database.url: this is not a database of chatd, or no `chatd serve` has used it yet."
            )
        if newest and found != migrations.head():
            raise OperatorError(
                f"database.url: the schema is at version {found}, and this command needs version"
                f" {migrations.head()}. Run `chatd migrate`; for SQLite, `chatd serve` migrates, too."
            )
        yield engine


def require(config: Database) -> None:
    """Raises OperatorError if the SQLite file does not exist: SQLite would create an empty one."""
    file = file_of(config.url)
    if file is not None and not file.exists():
        raise OperatorError(
            f"database.url: the file {file} does not exist, so no token would be valid."
            " Run this command where `chatd serve` runs, with the same configuration."
        )


@contextmanager
def opened(config: Database) -> Iterator[Engine]:
    """An engine for the block that may write.

    Raises OperatorError for every error of the database or its URL, and changes nothing in the database of
    another application.
    """
    file = file_of(config.url)
    with _as_operator_errors(config.url), _disposed(writing_engine(config.url)) as engine:
        if file is not None:
            require_own_file(file)
            keep_private(file)
        else:
            require_sessions(engine)
            require_own_database(engine)
        yield engine


@contextmanager
def changed(config: Database, *, newest: bool = True) -> Iterator[Engine]:
    """Like `opened`, but only for an existing database of chatd, which it does not migrate."""
    with looked_at(config, newest=newest):
        pass
    with opened(config) as engine:
        yield engine


@contextmanager
def _disposed(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _as_operator_errors(url: str) -> Iterator[None]:
    """Turns errors of the database or its URL into OperatorError."""
    try:
        yield
    except (
        SQLAlchemyError,
        psycopg.Error,
        sqlite3.Error,
        TypeError,
        ValueError,
    ) as error:  # TypeError and ValueError: the URL has an option that the driver does not know
        if is_unanswered(error):
            raise DatabaseAway(_unreachable_text(url, error)) from error
        raise OperatorError(f"database.url: {_first_line(error)}") from error


def _unreachable_text(url: str, error: Exception) -> str:
    return (
        f"database.url: chatd cannot use PostgreSQL at {', '.join(urls.servers(url))}"
        f" ({why_unanswered(error)}). Start PostgreSQL there, or write the address of a server that runs and"
        " accepts writes; then start chatd again."
    )


def _upgrade(config: Database, engine: Engine) -> tuple[str | None, str]:
    file = file_of(config.url)
    if file is not None:
        _check_directory(file.parent)
    _refuse_newer(engine)
    _copy_before(file, engine)
    return migrations.upgrade(engine)


def _copy_before(file: Path | None, engine: Engine) -> None:
    """Copy an SQLite database before a migration, so that an operator can go back to the old version."""
    with engine.connect() as connection:
        found = migrations.current(connection)
    if file is None or found in (None, migrations.head()):
        return
    target = beside(file, f".before-{found}-to-{migrations.head()}")
    target.unlink(missing_ok=True)  # an earlier attempt may have left it before its migration failed
    copies.copy(file, target)
    log.info("schema_copied", file=str(target))


def _check_version(engine: Engine) -> None:
    _refuse_newer(engine)
    with engine.connect() as connection:
        found = migrations.current(connection)
    if found != migrations.head():
        raise ConfigError(
            f"database.url: the schema is {'missing' if found is None else f'at version {found}'}; this chatd"
            f" needs version {migrations.head()}. Run `chatd migrate` with the same configuration."
        )


def _refuse_newer(engine: Engine) -> None:
    with engine.connect() as connection:
        found = migrations.current(connection)
    if found is not None and not migrations.known(found):
        raise ConfigError(
            f"database.url: the schema is at version {found}, which this chatd does not know."
            " Install the newer chatd that made it."
        )


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(
            f"database.url: the directory {directory} does not exist. Create it, or change the path."
        )


def _report(upgrade: tuple[str | None, str]) -> None:
    before, after = upgrade
    if before is None:
        log.info("database_created", reason="database.url named no existing database, so this one starts empty")
    elif before != after:
        log.info("schema_migrated", before=before, after=after)


def _make_facts(engine: Engine) -> str:
    """Store the epoch and the secret that signs tokens, unless they exist. Returns the secret."""
    _fact(engine, "epoch", secrets.token_hex(8))
    return _fact(engine, "token_secret", secrets.token_hex(32))


def _fact(engine: Engine, key: str, fresh: str) -> str:
    """The value stored under `key`. If there is none, store `fresh`; of several nodes, the first one wins."""
    table = schema.facts
    into = sqlite.insert if is_sqlite(engine) else postgresql.insert
    with engine.begin() as connection:
        found = connection.scalar(select(table.c.value).where(table.c.key == key))
        if found is None:
            connection.execute(into(table).on_conflict_do_nothing(), {"key": key, "value": fresh})
            found = connection.scalar(select(table.c.value).where(table.c.key == key))
    assert found is not None
    return str(found)


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", error)).strip().splitlines()[0]
