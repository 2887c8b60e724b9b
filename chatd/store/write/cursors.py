"""Read and delivered cursors within one transaction: limits them to existing messages and moves them forward.

Only `transaction` uses this. It does not lock the conversation, because cursors have no seq and never go back.
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
        self._elsewhere: set[Key] = set()  # keys whose users have other connections
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
        """Move a cursor forward, at most to the newest message. A message that is read counts as delivered."""
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
        """Write the cursors in the order of their keys, so that two nodes cannot deadlock."""
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
        """A receipt for each cursor that has moved: for the room, or in a crowded room for the user only."""
        if not self._moved:
            return []
        crowded = self._crowded() if self._detail else set()
        return [
            self._notice(id, user, cursor, alone=id in crowded)
            for (id, user), cursor in sorted(self._moved.items())  # so that those of a room can be joined
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
