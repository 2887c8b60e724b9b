"""The clock by which rows become due: PostgreSQL's own, which all nodes share; with SQLite this machine's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, text

from chatd.core.model import timestamp

LONG_AGO = "1970-01-01T00:00:00.000000Z"  # due whatever the clock says, and before everything else


class Clock:
    """One moment, read once: `clock(seconds)` is so much later."""

    def __init__(self, connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            self._now = datetime.now(UTC)
        else:
            self._now = connection.scalar(text("SELECT clock_timestamp()")) or datetime.now(UTC)

    @property
    def milliseconds(self) -> int:
        return int(self._now.timestamp() * 1000)

    def __call__(self, seconds: float = 0.0) -> str:
        return timestamp(self._now + timedelta(seconds=seconds))
