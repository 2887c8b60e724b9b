"""What a backend asks about people: who is in a conversation, how far they have read, what is unread.

Plain functions of a connection, run by `Reader` in threads; each call sees one moment.
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

MEMBERS_MOST = 10_000  # members of one conversation that are looked at


class Member(Struct, frozen=True):
    user_id: int
    role: str | None
    muted_until: str | None


class ConversationState(Struct, frozen=True):
    """A conversation: its head, the ids of `MEMBERS_MOST` members, the first of them, their cursors."""

    seq: int
    member_ids: list[int]
    members: list[Member]
    receipts: list[Cursor]

    @property
    def crowded(self) -> bool:
        """There are more than are named."""
        return len(self.members) < len(self.member_ids)


class Unread(Struct, frozen=True):
    conversation_id: int
    seq: int
    unread: int


def member_ids(connection: Connection, conversation_id: int, most: int) -> tuple[int, list[int]]:
    """The members_version, and at most so many members as of it."""
    head = heads(connection, [conversation_id]).get(conversation_id)
    asked = {"conversation_id": conversation_id, "most": most}
    ids = [row.user_id for row in connection.execute(statements.MEMBERS, asked)]
    return head.members_version if head else 0, ids


def conversation_state(connection: Connection, conversation_id: int, detail: int) -> ConversationState:
    """Raises NotFound. Past `detail` members (0: any number) only the first are named, without cursors."""
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
    """(author, where everybody in its conversation stands). Raises NotFound."""
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
