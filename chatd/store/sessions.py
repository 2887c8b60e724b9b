"""PostgreSQL's sessions: sets each one up, knows which server it leads to, and ends those to an old primary.

All sessions of a store must lead to the same server, the primary. After a failover some may still lead to the
old one, where they would read outdated data and their writes would be lost. Therefore an error that shows a
failover ends all sessions, and each new session is compared with the earlier ones. The writer and the reader
call `strayed` before they return an answer.
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

# PostgreSQL's own timeouts. A node that stops within a transaction, or whose host vanishes, keeps its locks
# until the idle timeout or TCP's keepalive ends its session. They do not count within a pipeline.
SETTINGS = {
    "timezone": "UTC",  # in another zone, FOR_EVER would come back as a time in the year 10000
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "5s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
# The only values of synchronous_commit that keep an acknowledged write whatever server fails (G1).
DURABLE = ("on", "remote_apply")
CONNECT: dict[str, Any] = {
    "application_name": "chatd",
    "target_session_attrs": "read-write",  # finds the primary among several hosts, and refuses a standby
    "connect_timeout": 5,  # seconds, for each host
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds until a write to a vanished host fails
}
ANSWER_SECONDS = 5.0  # how long `look` waits for a server that accepts the connection and then does not answer
# SQLSTATEs of a server that chatd must not use: it is read-only, stops, starts, or the database was dropped.
NOT_FOR_US = frozenset({"25006", "57P01", "57P02", "57P03", "57P04", "57P05"})
# PostgreSQL 14 and newer report these parameters by themselves when they change, so reading
# them needs no query.
_STANDBY, _READ_ONLY = b"in_hot_standby", b"default_transaction_read_only"
# This is right immediately after a promotion, and every role may query it. pg_control_checkpoint() was
# rejected: it returns the old timeline until the next checkpoint.
_TIMELINE = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"

log = structlog.get_logger()


class Strayed(Exception):
    """A session leads to a server that has become read-only, or to an older primary than the newest session."""

    def __init__(self, message: str = "another server has taken over") -> None:
        super().__init__(message)


class Sessions:
    """The sessions of all engines that share this object.

    A session is usable while its generation is the newest.
    """

    def __init__(self) -> None:
        self.doubted = False  # whether the caller should `look`
        self._lock = threading.Lock()
        self._generation = 0
        self._timeline: int | None = None  # the timeline of the newest session
        self._sure = False  # whether that server has had no error since
        self._lines: dict[socket.socket, int] = {}  # the socket of each open session → its generation
        self._connect: Callable[[], psycopg.Connection[Any]] | None = None

    def watch(self, engine: Engine, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        """Track the sessions of `engine`. `connect` opens a session outside its pool."""
        self._connect = connect
        event.listen(engine, "connect", self._set_up)
        event.listen(engine, "checkout", self._check_out)
        event.listen(engine, "close", self._close)
        event.listen(engine, "handle_error", self._judge)

    def doubt(self) -> None:
        """A caller has waited too long for an answer: perhaps another server has taken over."""
        self.doubted = self._connect is not None

    def look(self) -> None:
        """Check whether another server has taken over, and if so, end the sessions to the old one.

        That also ends the waits of threads for the old server. Blocks for some seconds at most.
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
        parameter = driver.pgconn.parameter_status
        return b"on" in (parameter(_STANDBY), parameter(_READ_ONLY))

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
        # A fresh session is not checked: SQLAlchemy gives up if a check refuses it, too, and there is no better
        # one. If it has strayed, `strayed` finds that out before an answer is returned.
        if not record.info.pop("fresh", False) and self.has_strayed(driver, record.info):
            raise DisconnectionError("this session leads to an old primary, which another server has replaced")

    def _close(self, _driver: Any, record: Any) -> None:
        line = record.info.pop("line", None)
        if line is not None:
            with self._lock:
                self._lines.pop(line, None)
            line.close()

    def _judge(self, context: Any) -> None:
        if getattr(context.original_exception, "sqlstate", None) in NOT_FOR_US:
            context.is_disconnect = True
        connection = context.connection  # None if the error came before there was a connection
        if context.is_disconnect and connection is not None and not connection.invalidated:
            with self._lock:
                # An error of an older generation is no news: its sessions end already, and
                # newer ones lead elsewhere.
                if connection.info.get("generation") == self._generation:
                    self._generation += 1
                    self._sure = False

    def _compare(self, timeline: int | None) -> int:
        """The generation of a new session whose server has this timeline."""
        with self._lock:
            before = self._timeline
            if timeline is None or timeline == before:
                self._sure = True
                return self._generation
            if before is not None and timeline < before and self._sure:
                # The session leads to an old primary that still runs; the earlier sessions are right.
                return self._generation - 1
            self._timeline, self._sure = timeline, True
            if before is not None:
                self._generation += 1
                self._cut_off_older(timeline, before)
            return self._generation

    def _cut_off_older(self, timeline: int, before: int) -> None:
        """Shut down the sockets to the old server, on which threads may wait for an answer that never comes."""
        old = [line for line, generation in self._lines.items() if generation < self._generation]
        for line in old:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        log.warning("database_failed_over", timeline=timeline, before=before, sessions_ended=len(old))


def strayed(connection: Connection) -> bool:
    """Whether this session leads to an old primary: reads may be outdated and commits lost.

    False for SQLite.
    """
    sessions: Sessions | None = connection.info.get("sessions")
    if sessions is None:
        return False
    return sessions.has_strayed(connection.connection.driver_connection, connection.info)


def unreplicated(connection: Connection) -> bool:
    """Whether the last commit returned before the standby had it: it is on this server's disk only."""
    return bool(connection.info.pop("unreplicated", False))


def require_sessions(connect: Callable[[], psycopg.Connection[Any]]) -> None:
    """Raises OperatorError if a pooler in transaction mode shares one session of the server
    among several of ours.

    Two open sessions normally have two server processes, with two process ids. A pooler in transaction mode
    gives the second one the server process that the first has just released.
    """
    with connect() as one, connect() as other:
        for driver in (one, other):
            driver.autocommit = True
        seen = [_pid(driver) for driver in (one, one, other, other, one)]
    if len(set(seen)) != 2 or seen[0] != seen[1] or seen[0] != seen[4] or seen[2] == seen[0]:
        raise OperatorError(
            "database.url: leads to a pooler in transaction mode (PgBouncer?). chatd keeps settings and"
            " prepared statements in its sessions and would lose them. Write the address of PostgreSQL"
            " itself, or set pool_mode = session for this database. chatd has a small pool of its own."
        )


def prepare(driver: Any) -> None:
    """Apply the settings with a statement, because a pooler refuses or drops them as startup parameters."""
    asked = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in SETTINGS.items())
    durable = ", ".join(f"'{value}'" for value in DURABLE)
    commit = "set_config('synchronous_commit', 'on', false)"
    driver.execute(
        f"SELECT {asked}, CASE WHEN current_setting('synchronous_commit') NOT IN ({durable}) THEN {commit} END"
    )
    driver.commit()


def _timeline(driver: Any) -> int | None:
    """PostgreSQL's timeline: 1 plus the number of promotions. None if a managed server does not show it."""
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
    """Shut the session's socket after `seconds`. If the server itself hangs, its own timeouts do not help."""

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


def _notice(info: dict[str, Any], notice: Diagnostic) -> None:
    """Note that a commit's wait for the standby was cancelled, which PostgreSQL reports as
    success with a warning.
    """
    if notice.source_function == "SyncRepWaitForLSN":
        info["unreplicated"] = True


def connect_arguments(given: Iterable[str]) -> dict[str, Any]:
    """Arguments for libpq: those of `CONNECT` that the URL does not give itself."""
    in_url = set(given)
    return {name: value for name, value in CONNECT.items() if name not in in_url}
