"""Messages within one transaction: reads, creates and changes them. Only `transaction` uses this."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection

from chatd.store.write import statements
from chatd.store.write.commands import Create

Row = dict[str, Any]


class Messages:
    """The messages of a group of commands. `changed`: id → the new row of a message that existed before."""

    def __init__(self, connection: Connection, now: str) -> None:
        self._connection, self._now = connection, now
        self._rows: dict[int, Row] = {}
        self._created: list[Row] = []
        self.changed: dict[int, Row] = {}

    def read(self, ids: Collection[int]) -> None:
        if ids:
            found = self._connection.execute(statements.MESSAGES, {"ids": list(ids)}).mappings()
            self._rows = {row["id"]: dict(row) for row in found}

    def get(self, id: int) -> Row | None:
        return self._rows.get(id)

    def create(self, command: Create, seq: int) -> Row:
        """Make a new row. It has no id until `insert`."""
        row = {
            "chat_conversation_id": command.conversation_id,
            "user_id": command.user_id,
            "type": command.type,
            "content": command.content,
            "meta": command.meta,
            "created_at": self._now,
            "updated_at": self._now,
            "seq": seq,
            "client_id": command.client_id,
            "request_hash": command.request_hash(),
            "reply_to": command.reply_to,
            "edited_at": None,
            "deleted_at": None,
            "reactions": None,
        }
        self._created.append(row)
        return row

    def change(self, row: Row) -> None:
        self._rows[row["id"]] = self.changed[row["id"]] = row

    def insert(self) -> None:
        """Insert the new rows and set their ids.

        PostgreSQL returns the ids in order. SQLite returns rows in no certain order, so
        SQLAlchemy would send one statement per row. There this computes the ids itself,
        which is safe because SQLite has only one writer.
        """
        rows = self._created
        if not rows:
            return
        if self._connection.dialect.name == "sqlite" and len(rows) > 1:
            last = self._connection.scalar(statements.LAST_MESSAGE_ID) or 0
            for id, row in enumerate(rows, last + 1):
                row["id"] = id
            self._connection.execute(statements.INSERT_NUMBERED_MESSAGES, rows)
            return
        ids = self._connection.scalars(statements.INSERT_MESSAGES, rows).all()
        for row, id in zip(rows, ids, strict=True):
            row["id"] = id

    def update(self) -> None:
        for row in self.changed.values():
            self._connection.execute(statements.UPDATE_MESSAGE, self._altered(row))

    def _altered(self, row: Row) -> Row:
        names = ("content", "meta", "edited_at", "deleted_at", "reactions")
        return {"key": row["id"], "updated_at": self._now} | {name: row[name] for name in names}
