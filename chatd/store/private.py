"""SQLite's files are for their owner alone: they hold every message, and what signs tokens."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

PRIVATE = 0o600
OTHERS = 0o007
COMPANIONS = ("-wal", "-shm", "-journal")  # files that SQLite takes for a database's own, by their names

log = structlog.get_logger()


def keep_private(path: Path) -> None:
    """Make the file, empty, if it is not there: SQLite would let the umask decide.

    SQLite gives `-wal` and `-shm` the mode of the file. What others may read or write is closed to them, and to
    the group, which the same umask let in; what a group alone may do somebody has wanted. SQLite complains of
    what cannot be done here.
    """
    with suppress(OSError):
        _make(path)
    for suffix in ("", *COMPANIONS):
        with suppress(OSError):
            _close(path.with_name(path.name + suffix))


def _make(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        os.fchmod(descriptor, PRIVATE)  # a umask may have taken even that
    finally:
        os.close(descriptor)


def _close(file: Path) -> None:
    mode = file.stat().st_mode
    if mode & OTHERS:
        file.chmod(PRIVATE)
        log.warning("database_closed_to_others", file=str(file), mode=f"{mode & 0o777:04o}")
