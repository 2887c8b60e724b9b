"""Keeps SQLite's files private to their owner: they hold all messages and the secret that signs tokens."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import structlog

from chatd.store.files import beside

PRIVATE = 0o600
OTHERS = 0o007
COMPANIONS = ("-wal", "-shm", "-journal")  # suffixes of the files that SQLite keeps next to a database

log = structlog.get_logger()


def keep_private(path: Path) -> None:
    """Create the file, empty and private, if it does not exist; SQLite would let the umask decide its mode.

    If others may read or write an existing file, the umask has decided so, and nobody but the owner keeps
    access. If only the group has access, an operator has decided so, and it keeps it. SQLite gives `-wal` and
    `-shm` the mode of the file. Errors are ignored here, because SQLite reports them when it opens the file.
    """
    with suppress(OSError):
        _make(path)
    for suffix in ("", *COMPANIONS):
        with suppress(OSError):
            _close(beside(path, suffix))


def _make(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        os.fchmod(descriptor, PRIVATE)  # the umask may have removed the owner's rights as well
    finally:
        os.close(descriptor)


def _close(file: Path) -> None:
    mode = file.stat().st_mode
    if mode & OTHERS:
        file.chmod(PRIVATE)
        log.warning("database_closed_to_others", file=str(file), mode=f"{mode & 0o777:04o}")
