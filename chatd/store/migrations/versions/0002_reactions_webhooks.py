"""Reactions, with a summary in each message's row; events that wait for the backend's webhook.

This only adds to the schema, so the version of chatd before it keeps working.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("chat_messages", sa.Column("reactions", sa.JSON))
    op.create_table(
        "chat_reactions",
        sa.Column("message_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("emoji", sa.String(32), primary_key=True),
        sa.Column("user_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("created_at", _moment, nullable=False),
    )
    op.create_table(
        "chat_webhooks",
        sa.Column("id", _serial, primary_key=True),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_at", _moment, nullable=False),
        sa.Column("due_at", _moment, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("dead", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("error", sa.String(200)),
        sqlite_autoincrement=True,
    )
    op.create_index("chat_webhooks_due", "chat_webhooks", ["dead", "due_at"])
