"""Commits groups of commands, in the writer's thread, and says what became of each command.

A group that fails for one bad command is committed command by command. A group that waits for the lock of
somebody else is committed conversation by conversation, so that the others do not wait for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import structlog
from msgspec import Struct
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chatd.core.errors import DatabaseGone, Internal, Unavailable
from chatd.core.model import Group, now
from chatd.observe.logs import Recurring
from chatd.store.database_file import DatabaseFile
from chatd.store.failures import primary
from chatd.store.sessions import Strayed, strayed, unreplicated
from chatd.store.write import statements
from chatd.store.write.commands import AnyCommand, Delete, Edit, Fence, Notify, SetUser
from chatd.store.write.packing import unpack
from chatd.store.write.submission import Outcome
from chatd.store.write.transaction import Transaction

APART_WAIT = 100  # ms for a conversation's lock, once some of a group could not be had in time

# The server is gone, overloaded or locked. What was sent may or may not have been committed. A bare OSError is
# psycopg's, where there is no descriptor left to connect with.
_LOST = (OperationalError, InterfaceError, InternalError, PoolTimeout, Strayed, OSError)

log = structlog.get_logger()
_unavailable = Recurring("write_unavailable")


class Committed(Struct):
    """One outcome for each command. `groups` are what was committed. `settled`: the outbox rows that were to go
    have gone.
    """

    outcomes: list[Outcome]
    groups: list[Group]
    settled: bool = False


class Committer:
    """Synchronous. `failing`: the last commit found no database that takes any. `gone`: there is no database
    any more to commit to.
    """

    def __init__(self, engine: Engine, *, node: str | None, told: frozenset[str], file: DatabaseFile) -> None:
        self._engine, self._node, self._told, self._file = engine, node, told, file
        self.failing = False
        self.gone: DatabaseGone | None = None

    def commit(
        self, commands: list[AnyCommand], settled: Iterable[int] = (), lock_wait: int | None = None
    ) -> Committed:
        """`lock_wait` in ms, if not as long as usual."""
        try:
            outcomes, group = self._transact(commands, settled, lock_wait)
        except DatabaseGone as gone:
            self.gone = gone
            return Committed([Unavailable()] * len(commands), [])
        except _LOST as error:
            if _is_locked(error) and lock_wait is None:
                return self._commit_apart(commands)
            self.failing = not _is_locked(error)
            return Committed([_lost(error)] * len(commands), [])
        except Exception as error:
            if len(commands) > 1:  # one of them is bad: the others shall not suffer
                return self._commit_singly(commands)
            return Committed([_bad(error)] * len(commands), [])
        self.failing = False
        return Committed(outcomes, [group], settled=True)

    def _commit_singly(self, commands: list[AnyCommand]) -> Committed:
        outcomes: list[Outcome] = []
        groups: list[Group] = []
        for command in commands:
            one = self.commit([command])
            outcomes += one.outcomes
            groups += one.groups
        return Committed(outcomes, groups)

    def _commit_apart(self, commands: list[AnyCommand]) -> Committed:
        """A node that does not move holds the lock of a conversation: the others do not wait for it."""
        by_lock: dict[Any, list[int]] = {}
        for index, command in enumerate(commands):
            by_lock.setdefault(_lock_of(command), []).append(index)
        outcomes: list[Outcome] = [Unavailable()] * len(commands)
        groups: list[Group] = []
        for indexes in by_lock.values():
            part = self.commit([commands[index] for index in indexes], lock_wait=APART_WAIT)
            groups += part.groups
            for index, outcome in zip(indexes, part.outcomes, strict=True):
                outcomes[index] = outcome
        return Committed(outcomes, groups)

    def _transact(
        self, commands: list[AnyCommand], settled: Iterable[int], lock_wait: int | None
    ) -> tuple[list[Outcome], Group]:
        with self._engine.connect() as connection, connection.begin() as transaction:
            if lock_wait is not None:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {lock_wait}")
            written = Transaction(connection, self._node, self._told).run(
                [unpack(command) for command in commands], settled
            )
            if self.failing and not commands:  # an empty transaction would succeed on a full disk
                connection.execute(
                    statements.SET_FACT[connection.dialect.name], {"key": "tried", "value": now()}
                )
            if strayed(connection):
                raise Strayed
            self._file.check()
            try:
                transaction.commit()
                if unreplicated(connection):
                    raise Strayed("the standby does not have it for certain")
            except Exception as error:
                # Whether it was committed is not known: it is never tried again, and this connection, which
                # may still be in the middle of the transaction, is not used again.
                connection.invalidate()
                raise OperationalError("COMMIT", None, error) from error
            self._file.check()
            return written

    @property
    def damaged(self) -> bool:
        """Somebody has read from SQLite's file what SQLite has not written there."""
        return self._file.damaged

    def leave(self) -> None:
        """The database has gone: see `DatabaseFile.leave`."""
        self._file.leave(self._engine)

    def look(self) -> None:
        """For when nobody writes."""
        try:
            self._file.check()
        except DatabaseGone as gone:
            self.gone = gone


def _lost(error: Exception) -> Unavailable:
    _unavailable.warn(error=primary(error) or str(getattr(error, "orig", error)))
    return Unavailable()


def _bad(error: Exception) -> Internal:
    incident = secrets.token_hex(6)
    if isinstance(error, DBAPIError):
        log.error("write_failed", incident=incident, error=primary(error) or type(error.orig).__name__)
    else:
        log.error("write_failed", incident=incident, exc_info=error)
    return Internal(incident=incident)


def _lock_of(command: AnyCommand) -> Any:
    """What its lock depends on; a backend may change a message without saying in which conversation it is."""
    if isinstance(command, Edit | Delete) and command.conversation_id is None:
        return "message", command.message_id
    if isinstance(command, Notify | Fence):
        return type(command).__name__
    return ("user", command.user_id) if isinstance(command, SetUser) else command.conversation_id


def _is_locked(error: Exception) -> bool:
    """PostgreSQL gave up waiting for a row that somebody else holds: nothing has been written."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "55P03"
