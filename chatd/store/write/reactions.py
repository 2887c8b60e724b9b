"""Reactions within one transaction: one row per user, message and emoji, and a summary in the message's row.

Only `transaction` uses this. The summary, `{emoji: [count, [first users]]}`, saves a second query per message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection

from chatd.core.errors import LimitExceeded
from chatd.core.limits import EMOJI_USERS, EMOJIS
from chatd.store.keys import as_parameter
from chatd.store.write import statements
from chatd.store.write.commands import React

Key = tuple[int, int, str]  # message_id, user_id, emoji
Summary = dict[str, list[Any]]


class Reactions:
    def __init__(self, connection: Connection, now: str) -> None:
        self._connection, self._now = connection, now
        self._dialect = connection.dialect.name
        self._given: set[Key] = set()
        self._toggled: dict[Key, bool] = {}
        self._cleared: list[int] = []

    def read(self, commands: Sequence[React]) -> None:
        if keys := {_key(command) for command in commands}:
            query = statements.REACTIONS[self._dialect]
            rows = self._connection.execute(query, as_parameter(keys))
            self._given = {(message, user, emoji) for message, user, emoji in rows}

    def toggle(self, command: React, summary: Summary | None) -> Summary | None:
        """The message's new summary, or None if nothing changes. Raises LimitExceeded."""
        key = _key(command)
        if self._toggled.get(key, key in self._given) is command.on:
            return None
        fresh = dict(summary or {})
        count, users = fresh.get(command.emoji, (0, []))
        if command.on:
            if command.emoji not in fresh and len(fresh) >= EMOJIS:
                raise LimitExceeded(f"a message can have at most {EMOJIS} different reactions", field="emoji")
            fresh[command.emoji] = [count + 1, users if count >= EMOJI_USERS else [*users, command.user_id]]
        elif count <= 1:
            del fresh[command.emoji]
        else:
            left = [user for user in users if user != command.user_id]
            fresh[command.emoji] = [count - 1, left]
        self._toggled[key] = command.on
        return fresh

    def clear(self, message_id: int) -> None:
        """Remove all reactions of a deleted message."""
        self._cleared.append(message_id)

    def write(self) -> None:
        given = [_row(key, self._now) for key, on in self._toggled.items() if on and key not in self._given]
        taken = [_row(key, self._now) for key, on in self._toggled.items() if not on and key in self._given]
        if given:
            self._connection.execute(statements.GIVE_REACTIONS, given)
        for row in taken:
            self._connection.execute(statements.TAKE_REACTION, row)
        if self._cleared:
            self._connection.execute(statements.CLEAR_REACTIONS, {"ids": self._cleared})

    def refill(self, rows: Iterable[dict[str, Any]]) -> None:
        """Complete the lists of first users from which a user was removed. Call this after `write`."""
        for row in rows:
            for emoji, item in (row["reactions"] or {}).items():
                if len(item[1]) < min(item[0], EMOJI_USERS):
                    asked = {"message": row["id"], "wanted": emoji, "most": EMOJI_USERS}
                    item[1] = list(self._connection.scalars(statements.FIRST_REACTIONS, asked))


def _key(command: React) -> Key:
    return (command.message_id, command.user_id, command.emoji)


def _row(key: Key, now: str) -> dict[str, Any]:
    message_id, user_id, emoji = key
    return {"message": message_id, "user": user_id, "wanted": emoji, "created_at": now}
