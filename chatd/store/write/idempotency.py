"""Messages that a command may be a retry of, by their `client_id`, within one transaction; also those that
retention has removed.

Used by `transaction` and `permits`. Each answer sees what the commands before it in the group did.
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
        """`commands` are those with a `client_id`."""
        keys = {_key(command) for command in commands}
        self._look(statements.EARLIER_MESSAGES, keys)
        # Where nothing was ever removed there is nothing to look for.
        pruned = {id for id, row in conversations.items() if row["low_seq"]}
        self._look(statements.REMOVED_CLIENT_IDS, {key for key in keys if key[0] in pruned})

    def _look(self, query: Mapping[str, Select[Any]], keys: set[Key]) -> None:
        if keys:
            found = self._connection.execute(query[self._connection.dialect.name], as_parameter(keys))
            for row in found.mappings():
                self._earlier[row["chat_conversation_id"], row["user_id"], row["client_id"]] = dict(row)

    def find(self, command: Create) -> Row | None:
        """The message that it made the first time. Raises Conflict where that was another one."""
        earlier = self._earlier.get(_key(command))
        if earlier is not None and earlier["request_hash"] != command.request_hash():
            raise Conflict(field="client_id")
        return earlier

    def remember(self, command: Create, row: Row) -> None:
        if command.client_id is not None:
            self._earlier[_key(command)] = row


def _key(command: Create) -> Key:
    return command.conversation_id, command.user_id, command.client_id or ""
