"""Finds the message that an earlier attempt of the same request stored, by its idempotency key `client_id`.

It also finds messages that retention has removed. Only `transaction` and `permits` use this. Each answer takes
the earlier commands of the group into account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select

from chatd.core.errors import Conflict
from chatd.store.keys import as_parameter
from chatd.store.write import statements
from chatd.store.write.commands import Create

Key = tuple[int, int, str]  # conversation_id, user_id, client_id
Row = dict[str, Any]


class Idempotency:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._earlier: dict[Key, Row] = {}

    def read(self, commands: Sequence[Create], conversations: Mapping[int, Row]) -> None:
        """Read the earlier messages of `commands`, which all have a `client_id`."""
        keys = {_key(command) for command in commands}
        self._look(statements.EARLIER_MESSAGES, keys)
        # Save the second query for conversations from which retention has never removed anything.
        pruned = {id for id, row in conversations.items() if row["low_seq"]}
        self._look(statements.REMOVED_CLIENT_IDS, {key for key in keys if key[0] in pruned})

    def _look(self, query: Mapping[str, Select[Any]], keys: set[Key]) -> None:
        if keys:
            found = self._connection.execute(query[self._connection.dialect.name], as_parameter(keys))
            for row in found.mappings():
                self._earlier[row["chat_conversation_id"], row["user_id"], row["client_id"]] = dict(row)

    def find(self, command: Create) -> Row | None:
        """The message of an earlier attempt, or None.

        Raises Conflict if the earlier request had other content.
        """
        earlier = self._earlier.get(_key(command))
        if earlier is not None and earlier["request_hash"] != command.request_hash():
            raise Conflict(field="client_id")
        return earlier

    def remember(self, command: Create, row: Row) -> None:
        if command.client_id is not None:
            self._earlier[_key(command)] = row


def _key(command: Create) -> Key:
    return command.conversation_id, command.user_id, command.client_id or ""
