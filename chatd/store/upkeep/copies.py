"""Copies of an SQLite database: made while it is in use, looked at, put in its place."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from chatd.core.errors import OperatorError
from chatd.store import migrations, urls
from chatd.store.private import COMPANIONS, PRIVATE, keep_private

BUSY_SECONDS = 5.0  # that a look at a database waits for whoever writes it
STEPS = 100_000  # of SQLite's machine, between two moments at which Ctrl-C is heard
# What the header says of a file that a daemon serves from: a copy is none of these.
_NO_STAMP = ("PRAGMA user_version = 0", "PRAGMA application_id = 0")
_NEW_EPOCH = "UPDATE chat_meta SET value = ? WHERE key = 'epoch'"


def file_of(url: str) -> Path | None:
    """The file of an SQLite URL, None for another database."""
    parsed = urls.parse(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def copy(source: Path, target: Path) -> None:
    """A compact copy as of one moment, and on the disk; writers go on. Raises OperatorError.

    The name is taken at once, by an empty file, and the copy gets it when it was checked.
    """
    try:
        target.touch(mode=PRIVATE, exist_ok=False)
    except FileExistsError:
        raise OperatorError(f"{target} is there already. Name another file.") from None
    except OSError as error:
        raise OperatorError(f"{target}: {_reason(error)}") from error
    partial = partial_of(target)
    try:
        _remove(partial)  # of one that was killed
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
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """What a copy is called while it is made."""
    return target.with_name(f"{target.name}.partial")


def _vacuum_into(source: Path, target: Path) -> None:
    with closing(_open(source)) as connection:
        connection.set_progress_handler(lambda: 0, STEPS)
        connection.execute("VACUUM INTO ?", (str(target),))
    with closing(_open(target)) as connection:
        for statement in _NO_STAMP:
            connection.execute(statement)


def check(path: Path) -> str:
    """The revision of its schema. Raises OperatorError for a damaged file, or a foreign one."""
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
    """Put a copy in the place of a database that nobody uses; where the old one is now, if there was one.

    The copy gets an epoch of its own, so that clients without marks start over. Raises OperatorError, and has
    changed nothing then.
    """
    check(source)
    if target.exists():
        with _claimed(target):  # before the time is spent
            pass
    fresh = target.with_name(f"{target.name}.restoring")
    _remove(fresh)
    copy(source, fresh)  # as a database, not as a file: its newest pages may be in a log beside it
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
    """There is a database under the name at every moment: a daemon that found none would make an empty one."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = target.with_name(f"{target.name}.before-restore-{moment}")
    with _claimed(target) if target.exists() else nullcontext():
        for suffix in COMPANIONS:  # a log that somebody left would be played into the new database
            with suppress(FileNotFoundError):
                target.with_name(target.name + suffix).replace(kept.with_name(kept.name + suffix))
        if target.exists():
            keep_private(target)
            _keep(target, kept)
        fresh.replace(target)
        _sync(target.absolute().parent)
    return kept if kept.exists() else None


def _keep(target: Path, kept: Path) -> None:
    """Never over another file: it may be the only copy of the database before another restore."""
    try:
        kept.hardlink_to(target)
    except FileExistsError:
        raise OperatorError(f"{kept} is there already: another restore is at work.") from None
    except OSError:  # not every file system can
        if kept.exists():
            raise OperatorError(f"{kept} is there already: another restore is at work.") from None
        target.replace(kept)


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Nobody else has the database open, or can begin to use it. All of its log is in the file."""
    with closing(_open(path, timeout=0)) as connection:
        try:  # only who has a database for itself can leave WAL mode
            mode = connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0]
            if mode != "delete":
                raise OperatorError(f"{path}: it is in use.")
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise OperatorError(
                f"{path}: {_reason(error)}. If chatd serves from it, stop it first:"
                " systemctl stop chatd.socket chatd-api.socket chatd"
            ) from error
        yield


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
