"""Who may write what: the rules that the transaction keeps, and a look at what they say just now.

The transaction has the last word. Whoever would trouble somebody else about a command, the backend's hook for
instance, looks first, and troubles nobody about what would be refused.
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
    """`key`: conversation and user. Raises NotFound."""
    if not members.may_enter(key, rights):
        raise NotFound(field=field)


def visible(members: Members, command: Edit | Delete | React, row: Row | None) -> Row:
    """The message as it is now, if the user may see it and write in its room. Deleted is as good as gone.

    Raises NotFound, Muted.
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
    """The message as it is now, if the user may change it: its author, a moderator, the backend.

    Raises NotFound, Muted, Forbidden.
    """
    row = visible(members, command, row)
    if command.user_id in (None, row["user_id"]):
        return row
    if not members.moderates((row["chat_conversation_id"], command.user_id)):
        raise Forbidden("only its author or a moderator may change a message", field="id")
    return row


def look(connection: Connection, command: Create | Edit) -> None:
    """A user's command, before it goes to the writer. Raises NotFound, Muted, Forbidden."""
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
    """A retry is answered, whatever its sender may do by now."""
    if command.client_id is None:
        return False
    retries = Idempotency(connection)
    retries.read([command], {command.conversation_id: {"low_seq": 1}})
    return retries.find(command) is not None
