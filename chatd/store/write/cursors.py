"""Read and delivered cursors within one transaction: held against the conversation, then moved ahead.

Used by `transaction` alone. A conversation is not locked for them: they have no seq, and never go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Raw
from sqlalchemy import Connection

from chatd.core.model import Notice
from chatd.core.protocol import event
from chatd.store.keys import as_parameter
from chatd.store.write import statements
from chatd.store.write.commands import CursorMoved, MoveCursor

Key = tuple[int, int]  # conversation_id, user_id


class Cursors:
    def __init__(self, connection: Connection, now: str) -> None:
        self._connection, self._now = connection, now
        self._dialect = connection.dialect.name
        self._heads: dict[int, int] = {}  # conversation_id → its newest message
        self._before: dict[Key, CursorMoved] = {}
        self._moved: dict[Key, CursorMoved] = {}
        self._elsewhere: set[Key] = set()  # whose users have other connections
        self._detail = 0

    def read(self, commands: Sequence[MoveCursor]) -> None:
        if not commands:
            return
        self._detail = commands[0].detail  # a setting: the same for all
        conversations = as_parameter({(command.conversation_id,) for command in commands})
        rows = self._connection.execute(statements.NEWEST_MESSAGES[self._dialect], conversations)
        self._heads = {row[0]: row[1] for row in rows}
        keys = as_parameter({(command.conversation_id, command.user_id) for command in commands})
        for conversation_id, user, *ids in self._connection.execute(statements.CURSORS[self._dialect], keys):
            self._before[conversation_id, user] = CursorMoved(*ids)

    def move(self, command: MoveCursor) -> CursorMoved:
        """What is read was delivered, and nobody has read what is not there yet."""
        key = (command.conversation_id, command.user_id)
        before = self._moved.get(key) or self._before.get(key) or CursorMoved(0, 0)
        head = self._heads.get(command.conversation_id) or 0
        read = max(before.read, min(command.read, head))
        after = CursorMoved(read, max(before.delivered, read, min(command.delivered, head)))
        if after != before:
            self._moved[key] = after
        if command.elsewhere:
            self._elsewhere.add(key)
        return after

    def write(self) -> None:
        """In the order of their keys, so that two nodes cannot wait for each other."""
        if self._moved:
            rows = [
                {
                    "conversation_id": conversation_id,
                    "user_id": user,
                    "read_id": cursor.read,
                    "delivered_id": cursor.delivered,
                    "updated_at": self._now,
                }
                for (conversation_id, user), cursor in sorted(self._moved.items())
            ]
            self._connection.execute(statements.MOVE_CURSORS[self._dialect], rows)

    def notices(self) -> list[Notice]:
        """For each cursor that has moved: to the room, or to the user's own connections if it is crowded."""
        if not self._moved:
            return []
        crowded = self._crowded() if self._detail else set()
        return [
            self._notice(id, user, cursor, alone=id in crowded)
            for (id, user), cursor in sorted(self._moved.items())  # those of one room go out as one
            if id not in crowded or (id, user) in self._elsewhere
        ]

    def _notice(self, conversation_id: int, user: int, cursor: CursorMoved, *, alone: bool) -> Notice:
        to = [user] if alone else None
        return Notice(conversation_id, self._receipt(conversation_id, user, cursor), to=to, lasting=True)

    def _crowded(self) -> set[int]:
        asked = as_parameter({(id,) for id, _ in self._moved}) | {"most": self._detail + 1}
        rows = self._connection.execute(statements.COUNT_MEMBERS[self._dialect], asked)
        return {conversation_id for conversation_id, count in rows if count > self._detail}

    def _receipt(self, conversation_id: int, user: int, cursor: CursorMoved) -> Raw:
        before = self._before.get((conversation_id, user)) or CursorMoved(0, 0)
        moved: dict[str, Any] = {}
        if cursor.read > before.read:
            moved["read"] = cursor.read
        if cursor.delivered > before.delivered:
            moved["delivered"] = cursor.delivered
        return Raw(event("receipt", conversation_id=conversation_id, user_id=user, **moved))
