"""The writer's statements, built once at import, because building one costs more than running it.

Parameters whose names are plural are lists.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Column,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from chatd.core.model import State
from chatd.store import keys
from chatd.store.among import among
from chatd.store.rows import MARK_OF_LAST, MESSAGE_COLUMNS
from chatd.store.schema import (
    changes,
    client_ids,
    conversations,
    facts,
    members,
    messages,
    outbox,
    reactions,
    reads,
    users,
    webhooks,
)

_insert_of: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}

CONVERSATIONS_OF_MESSAGES = select(messages.c.id, messages.c.chat_conversation_id).where(
    among(messages.c.id, "ids")
)

EXISTING_CONVERSATIONS = select(conversations.c.id).where(among(conversations.c.id, "ids"))

# By dialect.
CREATE_CONVERSATIONS = {
    name: into(conversations).on_conflict_do_nothing().returning(conversations.c.id)
    for name, into in _insert_of.items()
}

_VERSIONS = ("members_version", "removed_version")

LOCK_CONVERSATIONS = (
    select(
        *[conversations.c[name] for name in ("id", "last_seq", "low_seq", *_VERSIONS)],
        MARK_OF_LAST,
    )
    .where(among(conversations.c.id, "ids"))
    .order_by(conversations.c.id)
    .with_for_update()
)


def _by_keys(wanted: Select[Any], kinds: keys.Kinds, *columns: Column[Any]) -> dict[str, Select[Any]]:
    """By dialect: the rows whose `columns` equal one of the `keys`."""

    def of(dialect: str) -> Select[Any]:
        rows, items = keys.listed(dialect, kinds)
        same = [column == item for column, item in zip(columns, items, strict=False)]
        return wanted.select_from(rows.join(columns[0].table, and_(*same)))

    return {dialect: of(dialect) for dialect in _insert_of}


MEMBERS = _by_keys(select(members), keys.INTEGERS, members.c.conversation_id, members.c.user_id)

EARLIER_MESSAGES = _by_keys(
    select(*MESSAGE_COLUMNS, messages.c.request_hash),
    keys.WITH_TEXT,
    messages.c.chat_conversation_id,
    messages.c.user_id,
    messages.c.client_id,
)

# The same for messages that retention has removed.
REMOVED_CLIENT_IDS = _by_keys(
    select(
        client_ids.c.message_id.label("id"),
        client_ids.c.conversation_id.label("chat_conversation_id"),
        *[client_ids.c[name] for name in ("user_id", "client_id", "seq", "created_at", "request_hash")],
    ),
    keys.WITH_TEXT,
    client_ids.c.conversation_id,
    client_ids.c.user_id,
    client_ids.c.client_id,
)

MESSAGES = select(*MESSAGE_COLUMNS).where(among(messages.c.id, "ids"))

INSERT_MESSAGES = insert(messages).returning(messages.c.id, sort_by_parameter_order=True)

# The highest id that SQLite's AUTOINCREMENT has ever assigned. `Messages.insert` counts on from it.
LAST_MESSAGE_ID = text(f"SELECT seq FROM sqlite_sequence WHERE name = '{messages.name}'")
INSERT_NUMBERED_MESSAGES = insert(messages)

UPDATE_MESSAGE = (
    update(messages)
    .where(messages.c.id == bindparam("key"))
    .values(
        {
            name: bindparam(name)
            for name in ("content", "meta", "edited_at", "deleted_at", "reactions", "updated_at")
        }
    )
)


def _set_members(into: Any) -> Any:
    fresh = {name: into.excluded[name] for name in ("state", "role", "muted_until", "updated_at")}
    upsert = into.on_conflict_do_update(index_elements=list(members.primary_key), set_=fresh)
    return upsert.returning(members.c.user_id)


SET_MEMBERS = {name: _set_members(into(members)) for name, into in _insert_of.items()}

INSERT_CHANGES = insert(changes)

# Cursors. A conversation without messages has no newest message.


def _for_each_place(value: Any) -> dict[str, Select[Any]]:
    """By dialect: a value per conversation.

    `keys` are [conversation_id]; `value` makes the subquery for one.
    """

    def of(dialect: str) -> Select[Any]:
        rows, (place,) = keys.listed(dialect, keys.PLACES)
        return select(place, value(place, rows)).select_from(rows)

    return {dialect: of(dialect) for dialect in _insert_of}


NEWEST_MESSAGES = _for_each_place(
    lambda place, rows: (
        select(func.max(messages.c.id))
        .where(messages.c.chat_conversation_id == place)
        .correlate(rows)
        .scalar_subquery()
    )
)


def _count_members(place: Any, rows: Any) -> Any:
    active = (members.c.conversation_id == place) & (members.c.state == State.ACTIVE.value)
    some = select(members.c.user_id).where(active).limit(bindparam("most")).correlate(rows).subquery()
    return select(func.count()).select_from(some).correlate(rows).scalar_subquery()


COUNT_MEMBERS = _for_each_place(_count_members)

CURSORS = _by_keys(
    select(reads.c.conversation_id, reads.c.user_id, reads.c.read_id, reads.c.delivered_id),
    keys.PAIRS,
    reads.c.conversation_id,
    reads.c.user_id,
)


def _move_cursors(name: str, into: Any) -> Any:
    further: Any = {"sqlite": func.max, "postgresql": func.greatest}[name]
    ids = {id: further(reads.c[id], into.excluded[id]) for id in ("read_id", "delivered_id")}
    upsert = into.on_conflict_do_update(
        index_elements=list(reads.primary_key), set_=ids | {"updated_at": into.excluded.updated_at}
    )
    return upsert.returning(reads.c.user_id)


MOVE_CURSORS = {name: _move_cursors(name, into(reads)) for name, into in _insert_of.items()}

# Reactions.

REACTIONS = _by_keys(
    select(reactions.c.message_id, reactions.c.user_id, reactions.c.emoji),
    keys.WITH_TEXT,
    reactions.c.message_id,
    reactions.c.user_id,
    reactions.c.emoji,
)

GIVE_REACTIONS = insert(reactions).values(
    message_id=bindparam("message"), user_id=bindparam("user"), emoji=bindparam("wanted")
)

TAKE_REACTION = delete(reactions).where(
    reactions.c.message_id == bindparam("message"),
    reactions.c.user_id == bindparam("user"),
    reactions.c.emoji == bindparam("wanted"),
)

CLEAR_REACTIONS = delete(reactions).where(among(reactions.c.message_id, "ids"))

FIRST_REACTIONS = (
    select(reactions.c.user_id)
    .where(reactions.c.message_id == bindparam("message"), reactions.c.emoji == bindparam("wanted"))
    .order_by(reactions.c.created_at, reactions.c.user_id)
    .limit(bindparam("most"))
)

# Users.

USERS = select(users).where(among(users.c.user_id, "user_ids")).with_for_update()


def _set_users(into: Any) -> Any:
    fresh = {name: into.excluded[name] for name in ("valid_after", "banned_until")}
    return into.on_conflict_do_update(index_elements=list(users.primary_key), set_=fresh)


SET_USERS = {name: _set_users(into(users)) for name, into in _insert_of.items()}


ADVANCED = ("last_seq", *_VERSIONS, "updated_at", "mark", "marked_seq")


def _advance_conversations(into: Any) -> Any:
    """Update many conversations with one statement: an upsert of rows that all exist."""
    fresh = {name: into.excluded[name] for name in ADVANCED}
    upsert = into.on_conflict_do_update(index_elements=[conversations.c.id], set_=fresh)
    return upsert.returning(conversations.c.id)  # without it SQLAlchemy sends one statement per row


ADVANCE_CONVERSATIONS = {name: _advance_conversations(into(conversations)) for name, into in _insert_of.items()}

INSERT_WEBHOOKS = insert(webhooks)

INSERT_OUTBOX = insert(outbox).returning(outbox.c.id)

# Skip a row that another node has locked to publish it, so that the writer never waits for
# another node's Redis.
SETTLE_OUTBOX = delete(outbox).where(
    outbox.c.id.in_(select(outbox.c.id).where(among(outbox.c.id, "ids")).with_for_update(skip_locked=True))
)


def _set_fact(into: Any) -> Any:
    return into.on_conflict_do_update(index_elements=[facts.c.key], set_={"value": into.excluded.value})


SET_FACT = {name: _set_fact(into(facts)) for name, into in _insert_of.items()}

# The fencing token of the node that reads `chat.ingest`: see `fencing`.
INGEST_FENCE = "ingest_fence"
FENCE = select(facts.c.value).where(facts.c.key == INGEST_FENCE).with_for_update(read=True)
