"""Reads about members, for the API: members of a conversation, their cursors, unread counts.

These are plain functions of a connection. `Reader` runs each in a thread, within one snapshot of the database.
"""

from __future__ import annotations

from msgspec import Struct
from sqlalchemy import Connection

from chatd.core.errors import NotFound
from chatd.core.limits import INBOX_ROOMS, UNREAD_MAX
from chatd.store import keys
from chatd.store.read import statements
from chatd.store.read.lookups import heads
from chatd.store.read.snapshots import Cursor

MEMBERS_MOST = 10_000  # members of one conversation that are read at most


class Member(Struct, frozen=True):
    user_id: int
    role: str | None
    muted_until: str | None


class ConversationState(Struct, frozen=True):
    """A conversation: its last seq, up to `MEMBERS_MOST` member ids, details of the first
    members, their cursors.
    """

    seq: int
    member_ids: list[int]
    members: list[Member]
    receipts: list[Cursor]

    @property
    def crowded(self) -> bool:
        """Whether `members` does not have all members."""
        return len(self.members) < len(self.member_ids)


class Unread(Struct, frozen=True):
    conversation_id: int
    seq: int
    unread: int


def member_ids(connection: Connection, conversation_id: int, most: int) -> tuple[int, list[int]]:
    """(members_version, at most `most` member ids), from one snapshot."""
    head = heads(connection, [conversation_id]).get(conversation_id)
    asked = {"conversation_id": conversation_id, "most": most}
    ids = [row.user_id for row in connection.execute(statements.MEMBERS, asked)]
    return head.members_version if head else 0, ids


def conversation_state(connection: Connection, conversation_id: int, detail: int) -> ConversationState:
    """The state of a conversation. With more than `detail` members (0: no limit) it has no cursors and only the
    first `detail` members. Raises NotFound.
    """
    head = heads(connection, [conversation_id]).get(conversation_id)
    if head is None:
        raise NotFound(field="conversation_id")
    asked = {"conversation_id": conversation_id, "most": MEMBERS_MOST}
    members = [Member(*row) for row in connection.execute(statements.MEMBERS, asked)]
    named = members[: detail or MEMBERS_MOST]
    receipts: list[Cursor] = []
    if len(named) == len(members):
        rows = connection.execute(statements.CURSORS, {"conversation_ids": [conversation_id]})
        receipts = [Cursor(user, read, delivered) for _, user, read, delivered in rows]
    return ConversationState(head.seq, [member.user_id for member in members], named, receipts)


def cursors_of_message(connection: Connection, message_id: int) -> tuple[int, list[Cursor]]:
    """(the message's author, the cursors of its conversation). Raises NotFound."""
    found = connection.execute(statements.CONVERSATION_OF_MESSAGE, {"id": message_id}).first()
    if found is None:
        raise NotFound(field="id")
    asked = {"conversation_id": found.chat_conversation_id, "most": MEMBERS_MOST}
    cursors = [Cursor(*row) for row in connection.execute(statements.CURSORS_OF_PEOPLE, asked)]
    return found.user_id, cursors


def unread_of_user(connection: Connection, user_id: int) -> list[Unread]:
    asked = {"user_id": user_id, "most": INBOX_ROOMS}
    ids = list(connection.scalars(statements.CONVERSATIONS_OF_USER, asked))
    if not ids:
        return []
    wanted = keys.as_parameter([(0, user_id, id) for id in ids]) | {"most": UNREAD_MAX}
    rows = connection.execute(statements.UNREAD[connection.dialect.name], wanted)
    found = {id: Unread(id, seq, unread) for id, seq, unread in rows}
    return [found[id] for id in ids]


def valid_after(connection: Connection, user_id: int) -> int:
    rows = connection.execute(statements.STANDINGS, {"user_ids": [user_id]}).all()
    return rows[0].valid_after if rows else 0
