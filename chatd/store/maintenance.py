"""The database's part of the operator's commands.

Each opens an engine of its own, whether a daemon runs or not.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import update

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.store import schema, urls
from chatd.store.database import changed, looked_at, require
from chatd.store.files import file_of
from chatd.store.imports.alone import keep_others_out
from chatd.store.imports.importer import Importer
from chatd.store.upkeep import copies
from chatd.store.upkeep.erasure import Erasure, export, forget
from chatd.store.upkeep.retention import PAUSE, Pruner, Rules, remove_leftovers

RELAYED_BY_ANYBODY = "maintenance"  # a node name that no node has: every node relays such rows of the outbox


def backup(config: Database, target: Path) -> None:
    """Copy an SQLite database to `target`. Raises OperatorError; for PostgreSQL it says what to run instead."""
    file = file_of(config.url)
    if file is None:
        raise OperatorError(
            f"For PostgreSQL use its own tools: pg_dump --format=custom --file={target}"
            f" '{_without_password(config.url)}'"
        )
    require(config)
    copies.copy(file, target)


def restore(config: Database, source: Path) -> Path | None:
    """Replace an SQLite database with the copy `source`.

    Returns where the old one is now. Raises OperatorError.
    """
    file = file_of(config.url)
    if file is None:
        raise OperatorError(
            f"For PostgreSQL use its own tools: pg_restore --clean --if-exists {source}"
            f" --dbname='{_without_password(config.url)}', and then chatd restore --new-epoch"
        )
    return copies.replace(file, source)


def new_epoch(config: Database) -> None:
    """Give the database a new epoch, after which clients without marks drop what they have and load it again.

    It is needed after a restore, because the database may lack messages that clients have.
    Raises OperatorError.
    """
    facts = schema.facts
    with changed(config, newest=False) as engine, engine.begin() as connection:
        renewed = update(facts).where(facts.c.key == "epoch").values(value=secrets.token_hex(8))
        if not connection.execute(renewed).rowcount:
            raise OperatorError("database.url: no `chatd serve` has used this database yet.")


def prune(config: Database, rules: Rules, tell: Callable[[int, int], None], *, dry: bool) -> int:
    """Remove messages by `rules`; with `dry`, only count them. Returns the number of messages.

    After each step `tell` gets (removed so far, to remove in all). Raises OperatorError.
    """
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
    """All data about a user, row by row. Raises OperatorError."""
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
    """Erase a user. Returns (messages erased, whether SQLite's log no longer holds their bytes).

    `Erasure` explains `tell` and `settle`, `forget` explains `anew`. Raises OperatorError.
    """
    with changed(config) as engine:
        node = RELAYED_BY_ANYBODY if redis else None
        count = Erasure(engine, user_id, node, tell).run(settle)
        return count, forget(engine, anew=anew)


def import_messages(config: Database, importer: Callable[[], Importer], *, dry: bool) -> Importer:
    """Run an import; with `dry`, only check it. `importer` opens the source, after chatd's own database.

    Raises OperatorError, also if another process uses the database and this is not `dry`.
    """
    file = file_of(config.url)
    if file is not None and not file.exists():
        raise OperatorError(
            f"database.url: the file {file} does not exist. Run `chatd migrate`, which makes it."
        )
    if dry:
        with looked_at(config, newest=True) as engine, closing(importer()) as one:
            one.check(engine)
            return one
    with changed(config) as engine:
        guard = keep_others_out(engine)
        with closing(importer()) as one:
            one.run(engine, guard)
            return one


def _without_password(url: str) -> str:
    """The URL for pg_dump and pg_restore, which ask for the password or read it from ~/.pgpass."""
    return urls.parse(url).set(drivername="postgresql", password=None).render_as_string()
