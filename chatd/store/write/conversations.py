"""Conversations within one transaction: finds them, creates missing ones, locks them in id
order, numbers changes.

Only `transaction` uses this. It locks a conversation before the transaction reads anything else about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from chatd.store.write import statements
from chatd.store.write.commands import (
    AnyCommand,
    Create,
    Delete,
    Edit,
    Fence,
    MoveCursor,
    Notify,
    React,
    Rights,
    SetMember,
    SetUser,
)

Row = dict[str, Any]
MARK_BYTES = 6  # random bytes: enough that two histories never have the same mark by accident


class Conversations:
    """The conversations of a group of commands. All changes of the transaction have the same `mark`."""

    def __init__(self, connection: Connection, now: str) -> None:
        self._connection, self._now = connection, now
        self._dialect = connection.dialect.name
        self._of_message: dict[int, int] = {}  # message id → conversation id
        self.rows: dict[int, Row] = {}
        self._touched: set[int] = set()
        self.mark = secrets.token_urlsafe(MARK_BYTES)

    def __contains__(self, id: int) -> bool:
        return id in self.rows

    def __getitem__(self, id: int) -> Row:
        return self.rows[id]

    def of_message(self, id: int) -> int | None:
        """The conversation of a message that a command changes or replies to; None: no such message."""
        return self._of_message.get(id)

    def of(self, command: AnyCommand) -> int | None:
        """The conversation of a command. None: it concerns none, or its message does not exist."""
        if isinstance(command, Edit | Delete | React):
            return self._of_message.get(command.message_id)
        return None if isinstance(command, SetUser | Notify | Fence) else command.conversation_id

    def read(self, commands: Sequence[AnyCommand]) -> None:
        self._find_messages(commands)
        self._lock(commands)

    def _find_messages(self, commands: Sequence[AnyCommand]) -> None:
        ids = {command.message_id for command in commands if isinstance(command, Edit | Delete | React)}
        ids |= {c.reply_to for c in commands if isinstance(c, Create) and c.reply_to is not None}
        if ids:
            found = self._connection.execute(statements.CONVERSATIONS_OF_MESSAGES, {"ids": list(ids)})
            self._of_message = {row.id: row.chat_conversation_id for row in found}

    def _lock(self, commands: Sequence[AnyCommand]) -> None:
        """Create the missing conversations that a command may create, then lock all, both in
        the order of their ids.
        """
        numbering = [command for command in commands if not isinstance(command, MoveCursor)]
        ids = {id for command in numbering if (id := self.of(command)) is not None}
        if not ids:
            return
        if self._dialect == "sqlite":  # this transaction has SQLite's only lock already: read first
            self._read_locked(ids)
        if missing := self._missing(commands):
            rows = [{"id": id, "updated_at": self._now} for id in sorted(missing)]
            self._connection.execute(statements.CREATE_CONVERSATIONS[self._dialect], rows)
        if missing or not self.rows:
            self._read_locked(ids)

    def _missing(self, commands: Sequence[AnyCommand]) -> set[int]:
        """The conversations to create, as far as that is known before they are locked."""
        wanted = {
            command.conversation_id
            for command in commands
            if isinstance(command, SetMember)
            or (isinstance(command, Create) and command.rights is not Rights.MEMBER)
        }
        if self._dialect == "sqlite" or not wanted:
            return wanted - self.rows.keys()
        there = self._connection.scalars(statements.EXISTING_CONVERSATIONS, {"ids": list(wanted)})
        return wanted.difference(there)

    def _read_locked(self, ids: set[int]) -> None:
        rows = self._connection.execute(statements.LOCK_CONVERSATIONS, {"ids": list(ids)}).mappings()
        self.rows = {row["id"]: dict(row) for row in rows}

    def number(self, id: int) -> tuple[int, str | None]:
        """The seq of a new change, and the mark of the change before it."""
        row = self.rows[id]
        row["last_seq"] += 1
        self._touched.add(id)
        previous, row["mark"] = row["mark"], self.mark
        return row["last_seq"], previous

    def touch(self, id: int) -> None:
        """Note that the row has changed although there is no new seq."""
        self._touched.add(id)

    def write(self) -> None:
        if self._touched:
            touched = [self._advanced(self.rows[id]) for id in sorted(self._touched)]
            self._connection.execute(statements.ADVANCE_CONVERSATIONS[self._dialect], touched)

    def _advanced(self, row: Row) -> Row:
        marked = {"marked_seq": row["last_seq"], "updated_at": self._now}
        names = ("id", "last_seq", "members_version", "removed_version", "mark")
        return {name: row[name] for name in names} | marked
