"""Idempotency keys and log entries of messages that retention removes; the version of the last removed member.

This only adds to the schema, so the version of chatd before it keeps working.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column(
        "chat_conversations",
        sa.Column("removed_version", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "chat_client_ids",
        sa.Column("conversation_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("client_id", sa.String(64), primary_key=True),
        sa.Column("message_id", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", _moment, nullable=False),
        sa.Column("request_hash", sa.LargeBinary(16), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "chat_removed_messages",
        sa.Column("conversation_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("message_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("last_seq", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.BigInteger, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("created_at", _moment, nullable=False),
        sa.Column("deleted_at", _moment, nullable=False),
        sqlite_with_rowid=False,
    )
