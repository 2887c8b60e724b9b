"""A random mark in each change, so that a cursor proves that it is of this history.

All of it is additive: the version before works on with this schema, and what it writes has no mark.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("chat_changes", sa.Column("mark", sa.String(8)))
    op.add_column("chat_conversations", sa.Column("mark", sa.String(8)))
    op.add_column("chat_conversations", sa.Column("marked_seq", sa.BigInteger))
