"""What a database holds, read past chatd: that is the truth."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

from tests.faults.history import Conversation, Logged, Stored

Rows = Callable[[str], list[Any]]


def of_sqlite(path: Path) -> Rows:
    def rows(query: str) -> list[Any]:
        with closing(connect_sqlite(path)) as connection:
            return connection.execute(query).fetchall()

    return rows


def of_postgres(url: str) -> Rows:
    def rows(query: str) -> list[Any]:
        with psycopg.connect(url, connect_timeout=5) as connection:
            return connection.execute(query.encode()).fetchall()

    return rows


def connect_sqlite(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=10, isolation_level=None)


def heads(rows: Rows) -> dict[int, tuple[int, str | None]]:
    """By conversation: the last seq, and its mark."""
    found = rows(
        "SELECT id, last_seq, m.mark FROM chat_conversations LEFT JOIN chat_changes AS m"
        " ON m.conversation_id = id AND m.seq = last_seq"
    )
    return {id: (head, mark) for id, head, mark in found}


def contents(rows: Rows) -> list[Conversation]:
    found = {id: Conversation(id, head, [], []) for id, (head, _) in heads(rows).items()}
    for conversation, *row in rows(
        "SELECT conversation_id, seq, kind, message_id, mark FROM chat_changes ORDER BY conversation_id, seq"
    ):
        found[conversation].log.append(Logged(*row))
    for conversation, deleted, *row in rows(
        "SELECT chat_conversation_id, deleted_at, id, user_id, seq, client_id, content FROM chat_messages"
        " ORDER BY id"
    ):
        stored = Stored(*row)
        assert (stored.content is None) == (deleted is not None)
        found[conversation].messages.append(stored)
    return list(found.values())
