"""What a transaction leaves for others to carry out: the outbox, for the bus, and the webhook's events.

In the same transaction as what they tell of: neither is there without the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection

from chatd import calls
from chatd.model import Change
from chatd.store import statements
from chatd.store.clock import LONG_AGO
from chatd.store.commands import Notify
from chatd.store.rows import message

MESSAGE_CREATED = "message.created"


class Errands:
    """`messages` are the rows of those that the webhook is told of, `notifications` what else it is told."""

    def __init__(self, connection: Connection, node: str | None, now: str) -> None:
        """`node`: None if no bus outlives this process, so that there is no outbox."""
        self._connection, self._node, self._now = connection, node, now
        self.messages: list[dict[str, Any]] = []
        self.notifications: list[Notify] = []

    def fill_outbox(self, changes: Sequence[Change]) -> int | None:
        if self._node is None or not changes:
            return None
        lines = b"\n".join(change.payload for change in changes)
        row = {"node": self._node, "created_at": self._now, "payloads": lines}
        id: int | None = self._connection.scalar(statements.INSERT_OUTBOX, row)
        return id

    def settle(self, outbox_ids: Iterable[int]) -> None:
        """The bus has taken these groups."""
        if ids := list(outbox_ids):
            self._connection.execute(statements.SETTLE_OUTBOX, {"ids": ids})

    def fill_webhooks(self) -> bool:
        """Whether there is something for the webhook."""
        told = [(MESSAGE_CREATED, calls.body(MESSAGE_CREATED, message(row))) for row in self.messages]
        told += [(one.event, one.body) for one in self.notifications]
        if not told:
            return False
        rows = [
            {"event": event, "body": content, "created_at": self._now, "due_at": LONG_AGO}
            for event, content in told
        ]
        self._connection.execute(statements.INSERT_WEBHOOKS, rows)
        return True
