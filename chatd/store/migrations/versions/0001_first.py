"""Conversations, messages, their log of changes, members, users, read cursors, the outbox.

A migration must not change when `schema.py` does, so it defines the tables itself. A test compares both.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "chat_conversations",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("low_seq", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("members_version", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("updated_at", _moment, nullable=False),
    )
    op.create_table(
        "chat_messages",
        sa.Column("id", _serial, primary_key=True),
        sa.Column(
            "chat_conversation_id", sa.BigInteger, sa.ForeignKey("chat_conversations.id"), nullable=False
        ),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("meta", sa.JSON),
        sa.Column("created_at", _moment, nullable=False),
        sa.Column("updated_at", _moment, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("client_id", sa.String(64)),
        sa.Column("request_hash", sa.LargeBinary(16), nullable=False),
        sa.Column("reply_to", sa.BigInteger),
        sa.Column("edited_at", _moment),
        sa.Column("deleted_at", _moment),
        sa.UniqueConstraint("chat_conversation_id", "user_id", "client_id", name="chat_messages_client_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("chat_messages_page", "chat_messages", ["chat_conversation_id", "id"])
    op.create_table(
        "chat_changes",
        sa.Column("conversation_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("message_id", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "chat_members",
        sa.Column("conversation_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("role", sa.String(32)),
        sa.Column("muted_until", _moment),
        sa.Column("updated_at", _moment, nullable=False),
    )
    op.create_index("chat_members_user", "chat_members", ["user_id", "state"])
    op.create_table(
        "chat_users",
        sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("valid_after", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("banned_until", _moment),
    )
    op.create_table(
        "message_reads",
        sa.Column("conversation_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("read_id", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("delivered_id", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("updated_at", _moment, nullable=False),
    )
    op.create_table(
        "chat_outbox",
        sa.Column("id", _serial, primary_key=True),
        sa.Column("node", sa.String(32), nullable=False),
        sa.Column("created_at", _moment, nullable=False),
        sa.Column("payloads", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "chat_meta",
        sa.Column("key", sa.String(32), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
