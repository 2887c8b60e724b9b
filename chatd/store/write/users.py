"""Users within one transaction: whose tokens are void, and who is banned. Used by `transaction` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET
from sqlalchemy import Connection

from chatd.core.model import UserChange
from chatd.store.write import statements
from chatd.store.write.commands import SetUser, UserSet

Row = dict[str, Any]


class Users:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: dict[int, Row] = {}
        self._changes: dict[int, UserChange] = {}

    @property
    def changes(self) -> list[UserChange]:
        return list(self._changes.values())

    def read(self, commands: Sequence[SetUser]) -> None:
        if commands:
            asked = {"user_ids": sorted({command.user_id for command in commands})}
            found = self._connection.execute(statements.USERS, asked).mappings()
            self._rows = {row["user_id"]: dict(row) for row in found}

    def set(self, command: SetUser) -> UserSet:
        """What was void stays so. Void from now on is more than what was void before, whatever the clock says:
        tokens were issued since.
        """
        before = self._rows.get(command.user_id, {"valid_after": 0, "banned_until": None})
        banned = before["banned_until"] if command.banned_until is UNSET else command.banned_until
        least = before["valid_after"] + command.now
        after = {"valid_after": max(least, command.valid_after), "banned_until": banned}
        self._rows[command.user_id] = after | {"user_id": command.user_id}
        self._changes[command.user_id] = UserChange(command.user_id, **after)
        return UserSet()

    def write(self) -> None:
        if self._changes:
            rows = [self._rows[id] for id in sorted(self._changes)]
            self._connection.execute(statements.SET_USERS[self._connection.dialect.name], rows)
