"""The store as the daemon holds it: engines opened, schema at its version, facts made, writer and reader.

`open_store` is called before the nursery opens; everything that can be wrong with a database is said there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import structlog
from sqlalchemy import Engine, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from chatd.config import Database
from chatd.core.errors import ConfigError, OperatorError
from chatd.core.model import Group
from chatd.store import migrations, schema, urls
from chatd.store.database_file import DatabaseFile
from chatd.store.engine import is_sqlite, looking_engine, reading_engine, require_sessions, writing_engine
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
    """`token_secret` signs tokens unless the configuration has one."""

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
        self.wal = Wal(self._writing) if is_sqlite(self._writing) else None
        self.token_secret = _make_facts(self._writing)
        self._file.stamp(self._writing)

    def writer(
        self, *, node: str | None, on_commit: Callable[[Group], None], told: frozenset[str] = frozenset()
    ) -> Writer:
        return Writer(
            self._writing,
            node=node,
            on_commit=on_commit,
            told=told,
            sessions=self._sessions,
            file=self._file,
            settled=self.outbox.settled,
        )

    def close(self) -> None:
        self._writing.dispose()
        self._reading.dispose()
        self._file.close()


def open_store(config: Database) -> Store:
    """Raises OperatorError with what to change. Migrates SQLite; PostgreSQL only when told to."""
    with opened(config) as engine:
        if is_sqlite(engine):
            _report(_upgrade(config, engine))
        else:
            _check_version(engine)
        return Store(config)


def migrate(config: Database) -> tuple[str | None, str]:
    """The schema's revision before and after. Raises OperatorError."""
    with opened(config) as engine:
        revisions = _upgrade(config, engine)
        _make_facts(engine)  # so that `chatd token` works before the first daemon does
        return revisions


def token_secret(config: Database) -> str:
    """What signs tokens where the configuration names nothing. Raises OperatorError."""
    facts = schema.facts
    with looked_at(config) as engine, engine.connect() as connection:
        found = connection.scalar(select(facts.c.value).where(facts.c.key == "token_secret"))
    if found is None:
        raise OperatorError(
            "database.url: chatd has never served from this database, so no token would be valid."
        )
    return str(found)


@contextmanager
def looked_at(config: Database, *, newest: bool = False) -> Iterator[Engine]:
    """An engine for the block that cannot write. `newest`: what is looked for needs this version's schema.

    Raises OperatorError also for a database that is none of chatd's. It makes, migrates and changes none.
    """
    require(config)
    with _told(), _disposed(looking_engine(config.url)) as engine:
        with engine.connect() as connection:
            found = migrations.current(connection)
        if found is None:
            raise OperatorError(
                "database.url: this is no database of chatd, or chatd has never served from it."
            )
        if newest and found != migrations.head():
            raise OperatorError(
                f"database.url: the schema is at version {found}; this needs version {migrations.head()}, which"
                " `chatd migrate` makes of it, or `chatd serve` of an SQLite database."
            )
        yield engine


def require(config: Database) -> None:
    """Raises OperatorError where opening the store would make a new SQLite database."""
    name = urls.parse(config.url).database
    if config.url.startswith("sqlite") and not Path(name or "").exists():
        raise OperatorError(
            f"database.url: there is no {name} here yet, so no token would be valid."
            " Run this where `chatd serve` runs, with the same configuration."
        )


@contextmanager
def opened(config: Database) -> Iterator[Engine]:
    """An engine for the block. What a database or its URL is refused for becomes a sentence."""
    if file := copies.file_of(config.url):
        keep_private(file)
    with _told(), _disposed(writing_engine(config.url)) as engine:
        if not is_sqlite(engine):
            require_sessions(engine)
        yield engine


@contextmanager
def changed(config: Database, *, newest: bool = True) -> Iterator[Engine]:
    """The same for commands that change a database that is there: one of chatd's, which they do not migrate."""
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
def _told() -> Iterator[None]:
    """What a database or its URL is refused for becomes a sentence."""
    try:
        yield
    except (
        SQLAlchemyError,
        psycopg.Error,
        TypeError,
        ValueError,
    ) as error:  # the last two: options that no driver knows
        raise OperatorError(f"database.url: {_first_line(error)}") from error


def _upgrade(config: Database, engine: Engine) -> tuple[str | None, str]:
    if is_sqlite(engine):
        _check_directory(config.url)
    _refuse_newer(engine)
    _copy_before(config, engine)
    return migrations.upgrade(engine)


def _copy_before(config: Database, engine: Engine) -> None:
    """An SQLite database as it was before a migration, beside it: going back is a copy, not a migration."""
    file = copies.file_of(config.url)
    with engine.connect() as connection:
        found = migrations.current(connection)
    if file is None or found in (None, migrations.head()):
        return
    target = file.with_name(f"{file.name}.before-{found}-to-{migrations.head()}")
    target.unlink(missing_ok=True)  # of an attempt that did not get as far as this
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
            " Install the newer one."
        )


def _check_directory(url: str) -> None:
    directory = Path(urls.parse(url).database or "").absolute().parent
    if not directory.is_dir():
        raise ConfigError(f"database.url: there is no directory {directory}. Make it, or name another file.")


def _report(upgrade: tuple[str | None, str]) -> None:
    before, after = upgrade
    if before is None:
        log.info("database_created", reason="there was none under database.url, so everything begins anew")
    elif before != after:
        log.info("schema_migrated", before=before, after=after)


def _make_facts(engine: Engine) -> str:
    """The epoch and the secret that signs tokens, unless they are there. Returns the secret."""
    _fact(engine, "epoch", secrets.token_hex(8))
    return _fact(engine, "token_secret", secrets.token_hex(32))


def _fact(engine: Engine, key: str, fresh: str) -> str:
    """A value that is made once and shared by all nodes."""
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
