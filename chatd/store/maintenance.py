"""What an operator's commands do with a database, each with an engine of its own, beside a daemon or not."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import update

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.store import schema, urls
from chatd.store.database import changed, looked_at, require
from chatd.store.upkeep import copies
from chatd.store.upkeep.erasure import Erasure, export, forget
from chatd.store.upkeep.retention import PAUSE, Pruner, Rules, remove_leftovers

RELAYED_BY_ANYBODY = "maintenance"  # the node of an outbox row that no node calls its own


def backup(config: Database, target: Path) -> None:
    """Copy an SQLite database. Raises OperatorError; for PostgreSQL with what to run instead."""
    file = copies.file_of(config.url)
    if file is None:
        raise OperatorError(
            f"PostgreSQL has tools of its own: pg_dump --format=custom --file={target}"
            f" '{_without_password(config.url)}'"
        )
    require(config)
    copies.copy(file, target)


def restore(config: Database, source: Path) -> Path | None:
    """Put a copy in the place of an SQLite database; where the old one is now. Raises OperatorError."""
    file = copies.file_of(config.url)
    if file is None:
        raise OperatorError(
            f"PostgreSQL has tools of its own: pg_restore --clean --if-exists {source}"
            f" --dbname='{_without_password(config.url)}', and then chatd restore --new-epoch"
        )
    return copies.replace(file, source)


def new_epoch(config: Database) -> None:
    """Let clients that keep no marks start over: what they have seen may not be what the database holds.

    Raises OperatorError.
    """
    facts = schema.facts
    with changed(config, newest=False) as engine, engine.begin() as connection:
        renewed = update(facts).where(facts.c.key == "epoch").values(value=secrets.token_hex(8))
        if not connection.execute(renewed).rowcount:
            raise OperatorError("database.url: chatd has never served from this database.")


def prune(config: Database, rules: Rules, tell: Callable[[int, int], None], *, dry: bool) -> int:
    """How many messages went, or are to go. `tell` gets (so far, all) now and then. Raises OperatorError."""
    if dry:
        with looked_at(config, newest=True) as engine:
            return Pruner(engine, rules).find()
    with changed(config) as engine:
        pruner = Pruner(engine, rules, patient=True)
        all, done = pruner.find(), 0
        while (removed := pruner.step()) is not None:
            done += removed
            tell(done, all)
            time.sleep(PAUSE)
        while remove_leftovers(engine):
            time.sleep(PAUSE)
        return done


def exported(config: Database, user_id: int) -> Iterator[dict[str, Any]]:
    """Raises OperatorError."""
    with looked_at(config, newest=True) as engine:
        yield from export(engine, user_id)


def erase(
    config: Database,
    user_id: int,
    tell: Callable[[int], None],
    settle: Callable[[], None],
    *,
    redis: bool,
    anew: bool,
) -> tuple[int, bool]:
    """(messages erased, whether SQLite's log is free of their bytes). Raises OperatorError.

    For `tell` and `settle` see `Erasure`, for `anew` see `forget`.
    """
    with changed(config) as engine:
        node = RELAYED_BY_ANYBODY if redis else None
        count = Erasure(engine, user_id, node, tell).run(settle)
        return count, forget(engine, anew=anew)


def _without_password(url: str) -> str:
    """libpq asks for it, or finds it in ~/.pgpass."""
    return urls.parse(url).set(drivername="postgresql", password=None).render_as_string()
