"""Writes the rows of the outbox and of the webhook queue, in the same transaction as the
changes that they report.

So a change is never committed without its events, and an event never without its change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import Connection

from chatd.core import callbacks
from chatd.core.model import Change, Kind, MemberChange, State
from chatd.store.clock import LONG_AGO
from chatd.store.rows import message
from chatd.store.write import statements
from chatd.store.write.commands import Create, Delete, Edit, Notify, React

ByUser = Create | Edit | Delete | React

_EVENTS = {
    Kind.CREATED: "message.created",
    Kind.EDITED: "message.updated",
    Kind.DELETED: "message.deleted",
    Kind.REACTED: "message.reacted",
}


class _MessageEvent(Struct, frozen=True):
    """An event for the webhook: a user has done something to a message. `row` is the message afterwards."""

    event: str
    seq: int
    row: dict[str, Any]
    command: ByUser

    def body(self) -> bytes:
        shown = message(self.row)
        if isinstance(self.command, Create):
            return callbacks.body(self.event, shown)
        data = msgspec.to_builtins(msgspec.structs.replace(shown, seq=self.seq)) | {"by": self.command.user_id}
        if isinstance(self.command, React):
            data |= {"emoji": self.command.emoji, "on": self.command.on}
        return callbacks.body(self.event, data)


class Outgoing:
    """The outgoing events of one transaction.

    `notifications` are webhook events other than messages and members.
    """

    def __init__(self, connection: Connection, node: str | None, now: str, wanted: frozenset[str]) -> None:
        """`node`: the node's name in the outbox; None: the bus is in memory, and there is no outbox.

        `wanted`: the events that the webhook wants.
        """
        self._connection, self._node, self._now, self._wanted = connection, node, now, wanted
        self._messages: list[_MessageEvent] = []
        self.notifications: list[Notify] = []

    def tell_message(self, kind: Kind, seq: int, row: dict[str, Any], command: ByUser) -> None:
        """Note an event for the webhook.

        Its body is made later, because the row of a new message has no id yet.
        """
        if (event := _EVENTS[kind]) in self._wanted:
            self._messages.append(_MessageEvent(event, seq, row, command))

    def fill_outbox(self, changes: Sequence[Change]) -> int | None:
        if self._node is None or not changes:
            return None
        lines = b"\n".join(change.payload for change in changes)
        row = {"node": self._node, "created_at": self._now, "payloads": lines}
        id: int | None = self._connection.scalar(statements.INSERT_OUTBOX, row)
        return id

    def settle(self, outbox_ids: Iterable[int]) -> None:
        """Remove the rows of published groups."""
        if ids := list(outbox_ids):
            self._connection.execute(statements.SETTLE_OUTBOX, {"ids": ids})

    def fill_webhooks(self, members: Iterable[MemberChange]) -> bool:
        """Write the webhook's events; whether there were any."""
        events = [(one.event, one.body()) for one in self._messages]
        events += [_of_member(one) for one in members if _member_event(one) in self._wanted]
        events += [(one.event, one.body) for one in self.notifications]
        if not events:
            return False
        rows = [
            {"event": event, "body": content, "created_at": self._now, "due_at": LONG_AGO}
            for event, content in events
        ]
        self._connection.execute(statements.INSERT_WEBHOOKS, rows)
        return True


def _member_event(change: MemberChange) -> str:
    return "member.added" if change.state is State.ACTIVE else "member.removed"


def _of_member(change: MemberChange) -> tuple[str, bytes]:
    names = ("conversation_id", "user_id", "state", "role", "version")
    event = _member_event(change)
    return event, callbacks.body(event, {name: getattr(change, name) for name in names})
