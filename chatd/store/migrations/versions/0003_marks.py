"""A random mark in each change, by which a cursor proves that it belongs to this history.

This only adds to the schema, so the version of chatd before it keeps working. Its changes have no marks.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("chat_changes", sa.Column("mark", sa.String(8)))
    op.add_column("chat_conversations", sa.Column("mark", sa.String(8)))
    op.add_column("chat_conversations", sa.Column("marked_seq", sa.BigInteger))
