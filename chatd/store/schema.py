"""The tables. They have the names of the original Laravel schema, so that a Laravel backend can read them.

The writer and the reads build their statements from these tables. The migrations are in `migrations/`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
)

from chatd.core.model import timestamp


class Timestamp(TypeDecorator[str]):
    """A time: in Python the string of the wire, in PostgreSQL timestamptz, in SQLite UTC text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[str | None], Any]:
        return _sqlite_text if dialect.name == "sqlite" else _moment

    def result_processor(self, dialect: Dialect, coltype: Any) -> Callable[[Any], str | None]:
        return _from_sqlite_text if dialect.name == "sqlite" else _from_moment


# The same text that SQLAlchemy's DateTime writes to SQLite, `2026-01-01 00:00:00.000000`, but made without a
# datetime object: each message has four times, and parsing them would be slow.


def _sqlite_text(value: str | None) -> str | None:
    return None if value is None else f"{value[:10]} {value[11:26]}"


def _from_sqlite_text(value: str | None) -> str | None:
    return None if value is None else f"{value[:10]}T{value[11:]}Z"


def _moment(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def _from_moment(value: datetime | None) -> str | None:
    return None if value is None else timestamp(value)


# SQLite assigns ids by itself only to a column whose type is exactly INTEGER PRIMARY KEY.
Serial = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()

conversations = Table(
    "chat_conversations",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False, server_default="0"),
    # Retention has removed the log up to `low_seq`.
    Column("low_seq", BigInteger, nullable=False, server_default="0"),
    # `members_version` grows with each change of the members; `removed_version` is its value at the last
    # removal or ban.
    Column("members_version", BigInteger, nullable=False, server_default="0"),
    Column("removed_version", BigInteger, nullable=False, server_default="0"),
    Column("updated_at", Timestamp, nullable=False),
    # The mark of the change `marked_seq`. It is the last one only if that equals `last_seq`: versions of chatd
    # before marks write neither column.
    Column("mark", String(8)),
    Column("marked_seq", BigInteger),
)

messages = Table(
    "chat_messages",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("chat_conversation_id", BigInteger, ForeignKey("chat_conversations.id"), nullable=False),
    Column("user_id", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("content", Text),
    Column("meta", JSON(none_as_null=True)),
    Column("created_at", Timestamp, nullable=False),
    Column("updated_at", Timestamp, nullable=False),
    Column("seq", BigInteger, nullable=False),  # the seq of the change that created the message
    Column("client_id", String(64)),
    Column("request_hash", LargeBinary(16), nullable=False),
    Column("reply_to", BigInteger),
    Column("edited_at", Timestamp),
    Column("deleted_at", Timestamp),
    # A summary of `chat_reactions`: {emoji: [count, [first users]]}.
    Column("reactions", JSON(none_as_null=True)),
    # The idempotency key. Rows without a client_id do not collide, because NULLs are distinct.
    UniqueConstraint("chat_conversation_id", "user_id", "client_id", name="chat_messages_client_id"),
    Index("chat_messages_page", "chat_conversation_id", "id"),
    sqlite_autoincrement=True,  # SQLite never uses an id twice, even after its row was deleted
)

changes = Table(
    "chat_changes",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("message_id", BigInteger, nullable=False),
    Column("mark", String(8)),  # random, the same for all changes of a transaction; NULL if older than marks
    sqlite_with_rowid=False,
)

# Idempotency keys of messages that retention has removed. They are kept for good, so that a
# late retry is found.
client_ids = Table(
    "chat_client_ids",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("client_id", String(64), primary_key=True),
    Column("message_id", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("request_hash", LargeBinary(16), nullable=False),
    sqlite_with_rowid=False,
)

# Messages that retention has removed, but whose changes are still in the log. `last_seq` is their last change.
removed = Table(
    "chat_removed_messages",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("user_id", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("deleted_at", Timestamp, nullable=False),
    sqlite_with_rowid=False,
)

members = Table(
    "chat_members",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("role", String(32)),
    Column("muted_until", Timestamp),
    Column("updated_at", Timestamp, nullable=False),
    Index("chat_members_user", "user_id", "state"),
)

reactions = Table(
    "chat_reactions",
    metadata,
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    Column("emoji", String(32), primary_key=True),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", Timestamp, nullable=False),
)

users = Table(
    "chat_users",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    # Tokens from before this moment, in unix seconds, are void.
    Column("valid_after", BigInteger, nullable=False, server_default="0"),
    Column("banned_until", Timestamp),
)

reads = Table(
    "message_reads",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("read_id", BigInteger, nullable=False, server_default="0"),
    Column("delivered_id", BigInteger, nullable=False, server_default="0"),
    Column("updated_at", Timestamp, nullable=False),
)

outbox = Table(
    "chat_outbox",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("node", String(32), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("payloads", LargeBinary, nullable=False),  # one JSON event per line
    sqlite_autoincrement=True,
)

webhooks = Table(
    "chat_webhooks",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("event", String(32), nullable=False),
    Column("body", LargeBinary, nullable=False),  # the body of the request
    Column("created_at", Timestamp, nullable=False),
    Column("due_at", Timestamp, nullable=False),  # when the next attempt is due
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("dead", Boolean, nullable=False, server_default=false()),  # chatd has given the event up
    Column("error", String(200)),  # why the last attempt failed
    Index("chat_webhooks_due", "dead", "due_at"),
    sqlite_autoincrement=True,
)

# `chat.presence` explains `place`: a user with connections, or a room with subscribers.

nodes = Table(
    "chat_nodes",
    metadata,
    Column("lease", String(32), primary_key=True),
    Column("node", String(32), nullable=False),  # its name on the bus
    Column("beat", BigInteger, nullable=False),  # the heartbeat: changes as long as the node is alive
)

present = Table(
    "chat_present",
    metadata,
    Column("place", BigInteger, primary_key=True, autoincrement=False),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("lease", String(32), primary_key=True),
    Index("chat_present_lease", "lease"),
    sqlite_with_rowid=False,
)

attendance = Table(
    "chat_attendance",
    metadata,
    Column("place", BigInteger, primary_key=True, autoincrement=False),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("told", Boolean, nullable=False, server_default=false()),  # the last event reported presence
    Column("version", BigInteger, nullable=False, server_default="0"),  # of the last event; 0: there was none
    Column("due_at", Timestamp),  # when to compare it with `chat_present`; NULL: nothing has changed
    Index("chat_attendance_due", "due_at"),
    sqlite_with_rowid=False,
)

facts = Table(
    "chat_meta",
    metadata,
    Column("key", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)
