"""The fencing token of the node that reads `chat.ingest`, within one transaction.

Only `transaction` uses this. A row lock makes a commit that checks the token and one that changes it wait for
each other.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from chatd.core.errors import Superseded
from chatd.store.write import statements
from chatd.store.write.commands import AnyCommand, Create, Fence


class Fencing:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._token: str | None = None  # the newest token; only read if a command needs it

    def read(self, commands: Iterable[AnyCommand]) -> None:
        """Read or set the token. A token set by a command of the group counts for the whole group.

        Call this before locking conversations: with one order of locks, nodes cannot deadlock.
        """
        checked = False
        for command in commands:
            if isinstance(command, Fence):
                row = {"key": statements.INGEST_FENCE, "value": command.token}
                self._connection.execute(statements.SET_FACT[self._connection.dialect.name], row)
                self._token = command.token
            checked = checked or (isinstance(command, Create) and command.fence is not None)
        if checked and self._token is None:
            self._token = self._connection.scalar(statements.FENCE)

    def check(self, command: Create) -> None:
        """Raises Superseded if the command has a token that is not the newest."""
        if command.fence is not None and command.fence != self._token:
            raise Superseded()
