"""The text of a database's error for the log, without data from the rows concerned."""

from __future__ import annotations

import sqlite3

import psycopg


def primary(error: BaseException) -> str | None:
    """The primary message of SQLite or PostgreSQL, without parameters and details.

    None if the error comes from the driver itself, whose text may quote the content of a message.
    """
    found = getattr(error, "orig", None) or error
    if isinstance(found, sqlite3.Error):
        return str(found) if hasattr(found, "sqlite_errorcode") else None
    message = getattr(getattr(found, "diag", None), "message_primary", None)
    return str(message) if message else None


# SQLSTATEs of a server that ends the session, starts, stops, follows another server, or has no connection left.
_PASSING = frozenset({"57P01", "57P02", "57P03", "25006", "53300"})


def is_unanswered(error: BaseException) -> bool:
    """Whether no PostgreSQL server serves chatd now: none accepted a connection (the error has no SQLSTATE), or
    the server that did went away.
    """
    found = getattr(error, "orig", None) or error
    if not isinstance(found, psycopg.Error):
        return False
    if found.sqlstate is None:
        return isinstance(found, psycopg.OperationalError)
    return found.sqlstate in _PASSING or found.sqlstate.startswith("08")


def why_unanswered(error: BaseException) -> str:
    """libpq's reasons, one for each server that it tried, without duplicates."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    reasons = dict.fromkeys(line.rpartition("failed: ")[2].strip() for line in lines if "failed: " in line)
    return "; ".join(reasons) or lines[0]


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite reports that its file is damaged or not a database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
