"""What a database says of an error, for the log: its own words, and none of the row that it was about."""

from __future__ import annotations

import sqlite3


def primary(error: BaseException) -> str | None:
    """The primary message of SQLite or PostgreSQL, without parameters and details.

    None where somebody else says something: a driver's own complaint may quote a message's text.
    """
    found = getattr(error, "orig", None) or error
    if isinstance(found, sqlite3.Error):
        return str(found) if hasattr(found, "sqlite_errorcode") else None
    message = getattr(getattr(found, "diag", None), "message_primary", None)
    return str(message) if message else None


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite has found that its file is not what it has written."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind, the rest says more
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
