"""The rules about who may write what, which the transaction applies; and a check of these rules in advance.

Only the transaction's decision counts. The check in advance keeps chatd from asking the backend's hook about a
command that the transaction would refuse anyway.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from chatd.core.errors import Forbidden, Muted, NotFound
from chatd.core.model import now
from chatd.store.write import statements
from chatd.store.write.commands import Create, Delete, Edit, React, Rights
from chatd.store.write.idempotency import Idempotency
from chatd.store.write.members import Members

Row = dict[str, Any]


def check_entry(members: Members, key: tuple[int, int], rights: Rights, field: str = "conversation_id") -> None:
    """`key` is (conversation_id, user_id). Raises NotFound for `field` if the user may not enter."""
    if not members.may_enter(key, rights):
        raise NotFound(field=field)


def visible(members: Members, command: Edit | Delete | React, row: Row | None) -> Row:
    """The message as it is now, if the user may see it and write in its room.

    Raises NotFound, also for a deleted message, and Muted.
    """
    if row is None or command.conversation_id not in (None, row["chat_conversation_id"]):
        raise NotFound(field="id")
    if command.user_id is not None:
        key = (row["chat_conversation_id"], command.user_id)
        check_entry(members, key, command.rights, "id")
        members.check_mute(key, command.rights)
    if row["deleted_at"] is not None:
        raise NotFound(field="id")
    return row


def own(members: Members, command: Edit | Delete, row: Row | None) -> Row:
    """The message as it is now, if its author, a moderator or the backend asks.

    Raises NotFound, Muted, Forbidden.
    """
    row = visible(members, command, row)
    if command.user_id in (None, row["user_id"]):
        return row
    if not members.moderates((row["chat_conversation_id"], command.user_id)):
        raise Forbidden("only the author or a moderator may change this message", field="id")
    return row


def look(connection: Connection, command: Create | Edit) -> None:
    """Check a user's command before it goes to the writer. Raises NotFound, Muted, Forbidden."""
    assert command.conversation_id is not None
    assert command.user_id is not None
    key = (command.conversation_id, command.user_id)
    members = Members(connection, now())
    members.read({key})
    if isinstance(command, Edit):
        found = connection.execute(statements.MESSAGES, {"ids": [command.message_id]}).mappings().first()
        own(members, command, dict(found) if found else None)
        return
    check_entry(members, key, command.rights)
    try:
        members.check_mute(key, command.rights)
    except Muted:
        if not _sent_before(connection, command):
            raise


def _sent_before(connection: Connection, command: Create) -> bool:
    """Whether the command is a retry, which gets its earlier result even if its sender is muted by now."""
    if command.client_id is None:
        return False
    retries = Idempotency(connection)
    retries.read([command], {command.conversation_id: {"low_seq": 1}})
    return retries.find(command) is not None
