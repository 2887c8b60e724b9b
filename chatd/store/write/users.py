"""Users within one transaction: revokes tokens and bans users. Only `transaction` uses this."""

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
        """Revoke tokens, ban or unban. A revocation is never undone: `valid_after` does not go back.

        With `command.now` it always grows, even if the clock was set back: tokens may have been issued since
        the last revocation.
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
