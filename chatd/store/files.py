"""Finds SQLite's files: the database itself, and those that SQLite keeps next to it.

SQLite resolves symbolic links, and keeps the write-ahead log next to the file to which a link leads.
"""

from __future__ import annotations

import os
from pathlib import Path

from chatd.store import urls


def file_of(url: str) -> Path | None:
    """The absolute path of SQLite's file, without links; the file need not exist. None for PostgreSQL.

    Raises ConfigError.
    """
    parsed = urls.parse(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return resolved(Path(parsed.database))


def resolved(file: Path) -> Path:
    """The path without links. Unlike `Path.resolve` it raises nothing if links form a loop."""
    return Path(os.path.realpath(file))


def beside(file: Path, suffix: str) -> Path:
    """A file next to `file`, whose name is longer by `suffix`: `chatd.db-wal`, say."""
    return file.with_name(file.name + suffix)
