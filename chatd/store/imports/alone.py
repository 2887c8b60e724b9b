"""Makes sure that nothing else uses chatd's database during an import.

A daemon would give its messages the next ids, which the rows that are still to come have already.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event, text

from chatd.core.errors import OperatorError
from chatd.store.engine import is_sqlite

CACHE = 64 * 1024  # KiB: the pages of the indexes that a batch adds to
GONE_WITHIN = 2.0  # seconds that PostgreSQL may show a session after it was closed
POLL = 0.1
STOP = "Stop chatd first, on all nodes: systemctl stop chatd.socket chatd-api.socket chatd"

# All sessions of chatd have its application_name, unless the URL gives another, which is ours then, too.
_OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND application_name = current_setting('application_name')"
)


def keep_others_out(engine: Engine) -> Callable[[], None]:
    """Claim the database for this engine, which has not connected yet.

    Returns a check to call before each transaction. Both raise OperatorError if others use the database. SQLite
    keeps others out by itself, until the engine is disposed.
    """
    if is_sqlite(engine):
        event.listen(engine, "connect", _claim, insert=True)
        with engine.begin():  # now, and not after the first batch has been read
            return lambda: None
    _require_alone(engine)
    return lambda: _require_alone(engine)


def _claim(connection: Any, _record: Any) -> None:
    try:
        # Before the first access, so that SQLite takes a lock that it keeps. It needs no shared memory then.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
    except sqlite3.OperationalError as error:
        raise OperatorError(f"database.url: another process uses this database ({error}). {STOP}") from error


def _require_alone(engine: Engine) -> None:
    deadline = time.monotonic() + GONE_WITHIN
    while True:
        with engine.connect() as connection:
            others = connection.scalar(_OTHERS) or 0
        if not others:
            return
        if time.monotonic() > deadline:
            raise OperatorError(f"database.url: {others} other sessions of chatd use this database. {STOP}")
        time.sleep(POLL)
