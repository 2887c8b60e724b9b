"""Leases of running nodes, the users and rooms with connections to each, and the state reported to the backend.

This only adds to the schema, so the version of chatd before it keeps working.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "chat_nodes",
        sa.Column("lease", sa.String(32), primary_key=True),
        sa.Column("node", sa.String(32), nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "chat_present",
        sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("lease", sa.String(32), primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index("chat_present_lease", "chat_present", ["lease"])
    op.create_table(
        "chat_attendance",
        sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("told", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("version", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("due_at", _moment),
        sqlite_with_rowid=False,
    )
    op.create_index("chat_attendance_due", "chat_attendance", ["due_at"])
