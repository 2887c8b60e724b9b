"""The queries of the reads, built once at import, because building one costs more than running it.

Parameters whose names are plural are lists.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BindParameter, ColumnElement, FromClause, Select, bindparam, func, select, text, union

from chatd.core.model import State
from chatd.store import keys
from chatd.store.among import among
from chatd.store.rows import MARK_OF_LAST, MESSAGE_COLUMNS
from chatd.store.schema import changes, conversations, facts, members, messages, reads, removed, users


def _one(name: str) -> BindParameter[Any]:
    return bindparam(name)


def _count(rows: Select[Any]) -> Select[Any]:
    return select(func.count()).select_from(rows.subquery())


REVISION = text("SELECT version_num FROM alembic_version")

EPOCH = select(facts.c.value).where(facts.c.key == "epoch")

HEADS = select(
    *[conversations.c[name] for name in ("id", "last_seq", "low_seq", "members_version", "removed_version")],
    MARK_OF_LAST,
).where(among(conversations.c.id, "conversation_ids"))

STATES = select(members.c.user_id, members.c.state).where(
    members.c.conversation_id == _one("conversation_id"), among(members.c.user_id, "user_ids")
)

# The log with the messages as they are now. Messages that retention has removed are NULL.
_log = (
    select(changes.c.message_id)
    .where(changes.c.conversation_id == _one("conversation_id"), changes.c.seq > _one("after"))
    .order_by(changes.c.seq)
    .limit(_one("most"))
)
CHANGES_AFTER = _log.outerjoin_from(changes, messages, messages.c.id == changes.c.message_id).add_columns(
    changes.c.seq.label("change_seq"), changes.c.kind, changes.c.mark, *MESSAGE_COLUMNS
)
REMOVED_AFTER = select(removed).where(
    removed.c.conversation_id == _one("conversation_id"), removed.c.message_id.in_(_log)
)


def _marks(dialect: str) -> Select[Any]:
    """The marks of changes; `keys` are (conversation, seq)."""
    listed, (conversation, seq) = keys.listed(dialect, keys.PAIRS)
    mine = (changes.c.conversation_id == conversation) & (changes.c.seq == seq)
    return select(changes.c.conversation_id, changes.c.seq, changes.c.mark).select_from(
        listed.join(changes, mine)
    )


MARKS = {dialect: _marks(dialect) for dialect in ("sqlite", "postgresql")}

_page = select(*MESSAGE_COLUMNS).where(messages.c.chat_conversation_id == _one("conversation_id"))
NEWEST_MESSAGES = _page.order_by(messages.c.id.desc()).limit(_one("most"))
MESSAGES_BEFORE = NEWEST_MESSAGES.where(messages.c.id < _one("before"))
MESSAGES_AFTER = _page.where(messages.c.id > _one("after")).order_by(messages.c.id).limit(_one("most"))

# The queries take several conversations at once, so a client with hundreds of rooms costs no more queries than
# one with a single room.
CURSORS = (
    select(reads.c.conversation_id, reads.c.user_id, reads.c.read_id, reads.c.delivered_id)
    .where(among(reads.c.conversation_id, "conversation_ids"))
    .order_by(reads.c.conversation_id, reads.c.user_id)
)

# Newest messages that an unread count looks at: more would make a room of a million messages slow.
UNREAD_SCAN = 10_000


def _unread(user: ColumnElement[Any], listed: FromClause) -> Any:
    newer = (
        select(messages.c.user_id, messages.c.deleted_at)
        .where(
            messages.c.chat_conversation_id == conversations.c.id,
            messages.c.id > func.coalesce(reads.c.read_id, 0),
        )
        .order_by(messages.c.id.desc())
        .limit(UNREAD_SCAN)
        .correlate(conversations, reads)
        .subquery()
    )
    counted = select(newer.c.user_id).where(newer.c.user_id != user, newer.c.deleted_at.is_(None))
    return _count(counted.limit(_one("most")).correlate(listed)).correlate(listed).scalar_subquery()


_members = _count(
    select(members.c.user_id)
    .where(members.c.conversation_id == conversations.c.id, members.c.state == State.ACTIVE.value)
    .limit(_one("members_detail") + 1)
    .correlate(conversations)
).scalar_subquery()


def _rooms(dialect: str) -> Select[Any]:
    """Conversations and the state of users in them; `keys` are (request, user, conversation).

    A conversation without a row yet has a result, too, because the backend may have banned users from it
    already. The number of members is exact only up to `members_detail` + 1.
    """
    listed, (request, user, conversation) = keys.listed(dialect, keys.INTEGERS)
    own = members.alias()
    joined = (
        listed.outerjoin(conversations, conversations.c.id == conversation)
        .outerjoin(own, (own.c.conversation_id == conversation) & (own.c.user_id == user))
        .outerjoin(reads, (reads.c.conversation_id == conversation) & (reads.c.user_id == user))
    )
    return select(
        request,
        conversation,
        own.c.state,
        _members,
        func.coalesce(conversations.c.last_seq, 0),
        func.coalesce(conversations.c.low_seq, 0),
        MARK_OF_LAST,
        func.coalesce(conversations.c.members_version, 0),
        func.coalesce(reads.c.read_id, 0),
        func.coalesce(reads.c.delivered_id, 0),
        _unread(user, listed),
    ).select_from(joined)


def _unread_in(dialect: str) -> Select[Any]:
    """Unread counts; `keys` are (ignored, user, conversation)."""
    listed, (_, user, conversation) = keys.listed(dialect, keys.INTEGERS)
    joined = listed.join(conversations, conversations.c.id == conversation).outerjoin(
        reads, (reads.c.conversation_id == conversation) & (reads.c.user_id == user)
    )
    return select(conversation, conversations.c.last_seq, _unread(user, listed)).select_from(joined)


# By dialect.
UNREAD = {dialect: _unread_in(dialect) for dialect in ("sqlite", "postgresql")}
ROOMS = {dialect: _rooms(dialect) for dialect in ("sqlite", "postgresql")}

_active = (members.c.conversation_id == _one("conversation_id")) & (members.c.state == State.ACTIVE.value)

MEMBERS = (
    select(members.c.user_id, members.c.role, members.c.muted_until)
    .where(_active)
    .order_by(members.c.user_id)
    .limit(_one("most"))
)

CONVERSATION_OF_MESSAGE = select(messages.c.chat_conversation_id, messages.c.user_id).where(
    messages.c.id == _one("id")
)

# Members, and other users with a cursor, unless they were removed or banned.
_gone = (
    select(members.c.user_id)
    .where(members.c.conversation_id == _one("conversation_id"), members.c.state != State.ACTIVE.value)
    .scalar_subquery()
)
_people = union(
    select(members.c.user_id).where(_active),
    select(reads.c.user_id).where(
        reads.c.conversation_id == _one("conversation_id"), reads.c.user_id.not_in(_gone)
    ),
).subquery()
CURSORS_OF_PEOPLE = (
    select(_people.c.user_id, func.coalesce(reads.c.read_id, 0), func.coalesce(reads.c.delivered_id, 0))
    .outerjoin(
        reads,
        (reads.c.user_id == _people.c.user_id) & (reads.c.conversation_id == _one("conversation_id")),
    )
    .order_by(_people.c.user_id)
    .limit(_one("most"))
)

STANDINGS = select(users).where(among(users.c.user_id, "user_ids"))

CONVERSATIONS_OF_USER = (
    select(members.c.conversation_id)
    .join(conversations, conversations.c.id == members.c.conversation_id)
    .where(members.c.user_id == _one("user_id"), members.c.state == State.ACTIVE.value)
    .order_by(conversations.c.updated_at.desc())
    .limit(_one("most"))
)
