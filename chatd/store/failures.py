"""The text of a database's error for the log, without data from the rows concerned."""

from __future__ import annotations

import sqlite3


def primary(error: BaseException) -> str | None:
    """The primary message of SQLite or PostgreSQL, without parameters and details.

    None if the error comes from the driver itself, whose text may quote the content of a message.
    """
    found = getattr(error, "orig", None) or error
    if isinstance(found, sqlite3.Error):
        return str(found) if hasattr(found, "sqlite_errorcode") else None
    message = getattr(getattr(found, "diag", None), "message_primary", None)
    return str(message) if message else None


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite reports that its file is damaged or not a database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
