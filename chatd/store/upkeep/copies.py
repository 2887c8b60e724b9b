"""Copies an SQLite database while it is in use, checks a copy, and replaces a database with a copy."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from chatd.core.errors import OperatorError
from chatd.store import migrations
from chatd.store.files import beside
from chatd.store.private import COMPANIONS, PRIVATE, keep_private

BUSY_SECONDS = 5.0  # how long a read waits for SQLite's lock
STEPS = 100_000  # instructions of SQLite's virtual machine after which Python can handle Ctrl-C
# Removes the stamp of `DatabaseFile`: a copy is not the file that a daemon uses.
_NO_STAMP = ("PRAGMA user_version = 0", "PRAGMA application_id = 0")
_NEW_EPOCH = "UPDATE chat_meta SET value = ? WHERE key = 'epoch'"


def copy(source: Path, target: Path) -> None:
    """Make a compact, consistent copy and sync it to disk, while writers continue. Raises OperatorError.

    An empty file reserves the name first. The checked copy replaces it at the end.
    """
    try:
        target.touch(mode=PRIVATE, exist_ok=False)
    except FileExistsError:
        raise OperatorError(f"{target} already exists. Write the name of a new file.") from None
    except OSError as error:
        raise OperatorError(f"{target}: {_reason(error)}") from error
    partial = partial_of(target)
    try:
        _remove(partial)  # a copy that was killed may have left it
        partial.touch(mode=PRIVATE)
        _vacuum_into(source, partial)
        check(partial)
        _sync(partial)
        partial.replace(target)
        _sync(target.absolute().parent)
    except BaseException as error:
        for file in (partial, target):
            _remove(file)
        if isinstance(error, sqlite3.Error | OSError):
            raise OperatorError(f"{target}: {_reason(error)}") from error
        raise


def _remove(file: Path) -> None:
    for suffix in ("", *COMPANIONS):
        beside(file, suffix).unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """The name of a copy before it is complete."""
    return beside(target, ".partial")


def _vacuum_into(source: Path, target: Path) -> None:
    with closing(_open(source)) as connection:
        connection.set_progress_handler(lambda: 0, STEPS)
        connection.execute("VACUUM INTO ?", (str(target),))
    with closing(_open(target)) as connection:
        for statement in _NO_STAMP:
            connection.execute(statement)


def check(path: Path) -> str:
    """The revision of a database's schema. Raises OperatorError if it is damaged or not one of chatd's."""
    try:
        with closing(_open(path)) as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise OperatorError(f"{path}: this is not a database of chatd ({_reason(error)}).") from error
    if found != "ok":
        raise OperatorError(f"{path}: the file is damaged: {found}")
    if revision is None or not migrations.known(revision[0]):
        version = revision[0] if revision else "missing"
        raise OperatorError(f"{path}: the schema is at version {version}, which this chatd does not know.")
    return str(revision[0])


def replace(target: Path, source: Path) -> Path | None:
    """Replace a database that nobody uses with a copy. Returns where the old one is now; None: there was none.

    The copy gets a new epoch, so that clients without marks start over. Raises OperatorError, and then it has
    changed nothing.
    """
    check(source)
    if target.exists():
        with _claimed(target):  # fail now if it is in use, not after the copy
            pass
    fresh = beside(target, ".restoring")
    _remove(fresh)
    copy(source, fresh)  # not a copy of the file: its newest pages may be in the write-ahead log
    try:
        with closing(_open(fresh)) as connection, connection:
            connection.execute(_NEW_EPOCH, (secrets.token_hex(8),))
        _sync(fresh)
        _hand_over(fresh, target if target.exists() else target.absolute().parent)
        return _exchange(target, fresh)
    except (sqlite3.Error, OSError) as error:
        raise OperatorError(f"{target}: {_reason(error)}") from error
    finally:
        _remove(fresh)


def _exchange(target: Path, fresh: Path) -> Path | None:
    """Swap the files.

    A database has the name at every moment, since a starting daemon would create a missing one.
    """
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = beside(target, f".before-restore-{moment}")
    with _claimed(target) if target.exists() else nullcontext():
        for suffix in COMPANIONS:  # SQLite would apply an old log to the new database
            with suppress(FileNotFoundError):
                beside(target, suffix).replace(beside(kept, suffix))
        if target.exists():
            keep_private(target)
            _keep(target, kept)
        fresh.replace(target)
        _sync(target.absolute().parent)
    return kept if kept.exists() else None


def _keep(target: Path, kept: Path) -> None:
    """Give the old database the name `kept`, but never overwrite a file: it may be the only
    copy of an older one.
    """
    try:
        kept.hardlink_to(target)
    except FileExistsError:
        raise OperatorError(f"{kept} already exists: another restore is running.") from None
    except OSError:  # not every file system has hard links
        if kept.exists():
            raise OperatorError(f"{kept} already exists: another restore is running.") from None
        target.replace(kept)


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """A block in which nobody else has or can open the database.

    Its log is in the file. Raises OperatorError.
    """
    with closing(_open(path, timeout=0)) as connection:
        try:  # SQLite leaves WAL mode only for a connection that is the only one
            mode = connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
            if mode != "delete":
                raise OperatorError(f"{path}: another process uses this database.")
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise OperatorError(
                f"{path}: {_reason(error)}. If chatd uses this database, stop it first:"
                " systemctl stop chatd.socket chatd-api.socket chatd"
            ) from error
        yield


def _hand_over(path: Path, like: Path) -> None:
    """Give a file the owner of `like`, because root restores a database for the user of the service."""
    owner = like.stat()
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _open(path: Path, *, timeout: float = BUSY_SECONDS) -> sqlite3.Connection:
    """Open an existing database.

    Raises sqlite3.OperationalError if there is none, where SQLite would create one.
    """
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=timeout)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
