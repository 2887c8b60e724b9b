"""The clock that decides when rows are due: PostgreSQL's, which all nodes share; for SQLite, this machine's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, text

from chatd.core.model import timestamp

LONG_AGO = "1970-01-01T00:00:00.000000Z"  # makes a row due at once and before all others


class Clock:
    """The time at which it was made. `clock(seconds)` is that time plus `seconds`."""

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
