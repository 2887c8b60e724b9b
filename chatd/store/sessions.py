"""PostgreSQL's sessions: how each is set up, which server it leads to, and when it must not be used any more.

All sessions of a store lead to the same server, the one that takes writes. After a failover some may be left
that lead to the old one: there they would read what is out of date, or write what nobody will find again. So
what ends one session for such a reason ends all of them, and every new one is held against those before it.
Used by `engine`; the writer and the reader ask `strayed` before they give an answer.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psycopg
import structlog
from psycopg.errors import Diagnostic
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DisconnectionError

from chatd.core.errors import OperatorError

# PostgreSQL's own deadlines. A node that is stopped in mid-transaction, or whose host has vanished, holds its
# locks until the last ones end its session. They count between two statements, but not within a pipeline.
SETTINGS = {
    "timezone": "UTC",  # the year 9999 must not become 10000 on the way back
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# Of the settings of synchronous_commit only these two keep what was acknowledged whatever ends (G1).
DURABLE = ("on", "remote_apply")
CONNECT: dict[str, Any] = {
    "application_name": "chatd",
    "target_session_attrs": "read-write",  # of several hosts, and of one address that leads to a standby
    "connect_timeout": 5,  # seconds, for each host
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds until a write to a vanished host fails
}
ANSWER_SECONDS = 5.0  # for a server that has let us in, and then falls silent
# SQLSTATEs that say: this server is not for you. It takes no writes, stops, starts, or has lost the database.
NOT_FOR_US = frozenset({"25006", "57P01", "57P02", "57P03", "57P04", "57P05"})
# PostgreSQL 14 and newer report these by themselves whenever they change: to look at them costs nothing.
_STANDBY, _READ_ONLY = b"in_hot_standby", b"default_transaction_read_only"
# Right at once after a promotion (pg_control_checkpoint() tells the old timeline until the next checkpoint),
# and every role may ask it.
_TIMELINE = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"

log = structlog.get_logger()


class Strayed(Exception):
    """A session leads to a server that takes no writes any more, or to another one than the newest does."""

    def __init__(self, message: str = "another server has taken over") -> None:
        super().__init__(message)


class Sessions:
    """Of all engines that share this. A session is used as long as its generation is the newest."""

    def __init__(self) -> None:
        self.doubted = False  # whether it is time to `look`
        self._lock = threading.Lock()
        self._generation = 0
        self._timeline: int | None = None  # the newest session's, and
        self._sure = False  # whether nothing was wrong with that server since
        self._lines: dict[socket.socket, int] = {}  # of the open sessions, with their generations
        self._connect: Callable[[], psycopg.Connection[Any]] | None = None

    def watch(self, engine: Engine, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        """`connect` opens a session beside the engine's own."""
        self._connect = connect
        event.listen(engine, "connect", self._set_up)
        event.listen(engine, "checkout", self._check_out)
        event.listen(engine, "close", self._close)
        event.listen(engine, "handle_error", self._judge)

    def doubt(self) -> None:
        """Somebody has waited too long for an answer."""
        self.doubted = self._connect is not None

    def look(self) -> None:
        """See whether another server has taken over. Blocks for some seconds at most.

        If one has, the sessions that lead to the old one end, also those that wait for it just now.
        """
        self.doubted = False
        assert self._connect is not None
        with (
            suppress(psycopg.Error, OSError),
            self._connect() as driver,
            _cut_off_after(driver, ANSWER_SECONDS),
        ):
            self._compare(_timeline(driver))

    def has_strayed(self, driver: Any, info: dict[str, Any]) -> bool:
        if info["generation"] != self._generation:
            return True
        told = driver.pgconn.parameter_status
        return b"on" in (told(_STANDBY), told(_READ_ONLY))

    def _set_up(self, driver: Any, record: Any) -> None:
        info = record.info
        prepare(driver)
        info["timeline"] = timeline = _timeline(driver)
        info["generation"] = self._compare(timeline)
        info["sessions"], info["fresh"] = self, True
        driver.add_notice_handler(partial(_notice, info))
        info["line"] = line = socket.socket(fileno=os.dup(driver.fileno()))
        with self._lock:
            self._lines[line] = info["generation"]

    def _check_out(self, driver: Any, record: Any, _proxy: Any) -> None:
        # One that was opened for this is the best there is: SQLAlchemy gives up where it is refused, too. If it
        # has strayed already, who uses it finds out, or the next one does.
        if not record.info.pop("fresh", False) and self.has_strayed(driver, record.info):
            raise DisconnectionError("this session leads to a server that another one has taken over from")

    def _close(self, _driver: Any, record: Any) -> None:
        line = record.info.pop("line", None)
        if line is not None:
            with self._lock:
                self._lines.pop(line, None)
            line.close()

    def _judge(self, context: Any) -> None:
        if getattr(context.original_exception, "sqlstate", None) in NOT_FOR_US:
            context.is_disconnect = True
        connection = context.connection  # None where there was none yet
        if context.is_disconnect and connection is not None and not connection.invalidated:
            with self._lock:
                # What an older one says is no news: all of its kind end, and newer ones are of another server.
                if connection.info.get("generation") == self._generation:
                    self._generation += 1
                    self._sure = False

    def _compare(self, timeline: int | None) -> int:
        """The generation of a session that has found this timeline."""
        with self._lock:
            before = self._timeline
            if timeline is None or timeline == before:
                self._sure = True
                return self._generation
            if before is not None and timeline < before and self._sure:
                return (
                    self._generation - 1
                )  # an old primary that still runs; the sessions before are the right ones
            self._timeline, self._sure = timeline, True
            if before is not None:
                self._generation += 1
                self._cut_off_older(timeline, before)
            return self._generation

    def _cut_off_older(self, timeline: int, before: int) -> None:
        """Somebody may wait there for an answer that never comes."""
        old = [line for line, generation in self._lines.items() if generation < self._generation]
        for line in old:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        log.warning("database_failed_over", timeline=timeline, before=before, sessions_ended=len(old))


def strayed(connection: Connection) -> bool:
    """Whether what was read there may be out of date, and what is committed there lost. False for SQLite."""
    sessions: Sessions | None = connection.info.get("sessions")
    if sessions is None:
        return False
    return sessions.has_strayed(connection.connection.driver_connection, connection.info)


def unreplicated(connection: Connection) -> bool:
    """Whether its last commit was not waited for: it is on the disk, but perhaps not on the standby's."""
    return bool(connection.info.pop("unreplicated", False))


def require_sessions(connect: Callable[[], psycopg.Connection[Any]]) -> None:
    """Raises OperatorError where a pooler gives one session of the server to several of ours.

    Two sessions that are open at once have two processes of the server; behind a pooler in transaction mode the
    second is given the one that the first has just let go of.
    """
    with connect() as one, connect() as other:
        for driver in (one, other):
            driver.autocommit = True
        seen = [_pid(driver) for driver in (one, one, other, other, one)]
    if len(set(seen)) != 2 or seen[0] != seen[1] or seen[0] != seen[4] or seen[2] == seen[0]:
        raise OperatorError(
            "database.url: a pooler in transaction mode answers there (PgBouncer?). chatd keeps settings and"
            " prepared statements in its sessions, and would lose them: name PostgreSQL itself, or set"
            " pool_mode = session for this database. chatd has a small pool of its own."
        )


def prepare(driver: Any) -> None:
    """Settings are given by a statement: a pooler refuses them, or drops them, among the startup parameters."""
    asked = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in SETTINGS.items())
    durable = ", ".join(f"'{value}'" for value in DURABLE)
    commit = "set_config('synchronous_commit', 'on', false)"
    driver.execute(
        f"SELECT {asked}, CASE WHEN current_setting('synchronous_commit') NOT IN ({durable}) THEN {commit} END"
    )
    driver.commit()


def _timeline(driver: Any) -> int | None:
    """The number of times that a standby was promoted, and one. None where a managed server does not tell."""
    try:
        found: int = driver.execute(_TIMELINE).fetchone()[0]
    except psycopg.Error:
        if driver.broken:
            raise
        return None
    finally:
        if not driver.broken:
            driver.rollback()
    return found


@contextmanager
def _cut_off_after(driver: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
    """The server's own timeouts do not end the wait for a server that hangs."""

    def cut_off() -> None:
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    with socket.socket(fileno=os.dup(driver.fileno())) as line:
        timer = threading.Timer(seconds, cut_off)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _pid(driver: psycopg.Connection[Any]) -> int:
    row = driver.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _notice(info: dict[str, Any], told: Diagnostic) -> None:
    """Somebody has ended a commit's wait for the standby. PostgreSQL calls that a success, with a warning."""
    if told.source_function == "SyncRepWaitForLSN":
        info["unreplicated"] = True


def connect_arguments(given: Iterable[str]) -> dict[str, Any]:
    """For libpq: `CONNECT` without what the URL says itself."""
    said = set(given)
    return {name: value for name, value in CONNECT.items() if name not in said}
