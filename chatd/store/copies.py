"""Copies of an SQLite database: made while it is in use, looked at, put in its place."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import make_url

from chatd.errors import OperatorError
from chatd.store import migrations

BUSY_SECONDS = 5.0  # that a look at a database waits for whoever writes it
_NEW_EPOCH = "UPDATE chat_meta SET value = ? WHERE key = 'epoch'"
PRIVATE = 0o077  # umask: a copy holds every message, and what signs tokens


def file_of(url: str) -> Path | None:
    """The file of an SQLite URL, None for another database."""
    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def copy(source: Path, target: Path) -> None:
    """A compact copy as of one moment, and on the disk; writers go on. Raises OperatorError."""
    before = os.umask(PRIVATE)
    try:
        with closing(_open(source)) as connection:
            connection.execute("VACUUM INTO ?", (str(target),))
        check(target)
        _sync(target)
    except (sqlite3.Error, OSError) as error:
        with suppress(OSError):
            target.unlink()
        raise OperatorError(f"{target}: {_reason(error)}") from error
    finally:
        os.umask(before)


def check(path: Path) -> str:
    """The revision of its schema. Raises OperatorError for a damaged file, or a foreign one."""
    try:
        with closing(_open(path)) as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise OperatorError(f"{path}: this is no database of chatd ({_reason(error)}).") from error
    if found != "ok":
        raise OperatorError(f"{path}: the file is damaged: {found}")
    if revision is None or not migrations.known(revision[0]):
        version = revision[0] if revision else "missing"
        raise OperatorError(f"{path}: the schema is at version {version}, which this chatd does not know.")
    return str(revision[0])


def replace(target: Path, source: Path) -> Path | None:
    """Put a copy in the place of a database that nobody uses; where the old one is now, if there was one.

    The copy gets an epoch of its own, so that clients start over. Raises OperatorError, and has changed nothing
    then.
    """
    check(source)
    if target.exists():
        _claim(target)
    fresh = target.with_name(f"{target.name}.restoring")
    before = os.umask(PRIVATE)
    try:
        shutil.copyfile(source, fresh)
        with closing(_open(fresh)) as connection, connection:
            connection.execute(_NEW_EPOCH, (secrets.token_hex(8),))
        _sync(fresh)
        _hand_over(fresh, target if target.exists() else target.absolute().parent)
        kept = _set_aside(target)
        fresh.replace(target)
        _sync(target.absolute().parent)
    except (sqlite3.Error, OSError) as error:
        raise OperatorError(f"{target}: {_reason(error)}") from error
    finally:
        os.umask(before)
        fresh.unlink(missing_ok=True)
    return kept


def _claim(path: Path) -> None:
    """All of its log is in the file then. Only who has a database for itself can leave WAL mode."""
    try:
        with closing(_open(path, timeout=0)) as connection:
            mode = connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
    except sqlite3.Error as error:
        raise OperatorError(
            f"{path}: {_reason(error)}. If chatd serves from it, stop it first:"
            " systemctl stop chatd.socket chatd-api.socket chatd"
        ) from error
    if mode != "delete":
        raise OperatorError(f"{path}: it is in use.")


def _set_aside(target: Path) -> Path | None:
    if not target.exists():
        return None
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = target.with_name(f"{target.name}.before-restore-{moment}")
    target.replace(kept)
    return kept


def _hand_over(path: Path, like: Path) -> None:
    """To the one whose the database is: root restores for a service."""
    owner = like.stat()
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _open(path: Path, *, timeout: float = BUSY_SECONDS) -> sqlite3.Connection:
    """Raises sqlite3.OperationalError where there is no file: SQLite would make one."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=timeout)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
