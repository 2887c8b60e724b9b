"""Schema versions, with Alembic. chatd migrates SQLite at its start; `chatd migrate` migrates PostgreSQL."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

_HERE = Path(__file__).parent
# An advisory lock, so that two nodes do not migrate at once. The number is arbitrary.
_ADVISORY_LOCK = 0x63686174
VERSION_TABLE = "alembic_version"  # Alembic's own name for it


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Migrate the schema to this version of chatd. Returns the revision before (None: empty) and after."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        before = current(connection)
        command.upgrade(_config(connection), "head")
        return before, head()


def current(connection: Connection) -> str | None:
    """The revision of this database; None if it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """The revision that this version of chatd needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def known(revision: str) -> bool:
    return any(
        script.revision == revision for script in ScriptDirectory.from_config(_config()).walk_revisions()
    )


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE))
    config.attributes["connection"] = connection
    return config
