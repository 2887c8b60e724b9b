"""The fencing token of whoever reads `chat.ingest`, within one transaction.

Used by `transaction` alone. A commit that checks the token and one that changes it wait for each other.
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
        self._token: str | None = None  # the newest, if a command is about one

    def read(self, commands: Iterable[AnyCommand]) -> None:
        """Before any conversation is locked, as everybody does. A new token counts for all commands."""
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
        """Raises Superseded."""
        if command.fence is not None and command.fence != self._token:
            raise Superseded()
