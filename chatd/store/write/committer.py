"""Commits groups of commands, in the writer's thread, and returns an outcome for each command.

If one bad command makes a group fail, each command gets a transaction of its own. If another process holds a
lock that the group needs, each conversation gets a transaction of its own, so that the others do not wait for
the lock.
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

APART_WAIT = 100  # ms to wait for each conversation's lock, after the whole group has waited in vain

# The server is gone, overloaded or locked, and the commands may or may not have been committed. psycopg raises
# a bare OSError if the process has no file descriptor left for a connection.
_LOST = (OperationalError, InterfaceError, InternalError, PoolTimeout, Strayed, OSError)

log = structlog.get_logger()
_unavailable = Recurring("write_unavailable")


class Committed(Struct):
    """The result of `commit`: one outcome per command, and the committed groups.

    `settled`: the published outbox rows were removed.
    """

    outcomes: list[Outcome]
    groups: list[Group]
    settled: bool = False


class Committer:
    """Commits synchronously. `failing`: the last commit found no database that accepts writes.

    `gone`: the database's file is gone, so there will be no more commits.
    """

    def __init__(self, engine: Engine, *, node: str | None, wanted: frozenset[str], file: DatabaseFile) -> None:
        self._engine, self._node, self._wanted, self._file = engine, node, wanted, file
        self.failing = False
        self.gone: DatabaseGone | None = None

    def commit(
        self, commands: list[AnyCommand], settled: Iterable[int] = (), lock_wait: int | None = None
    ) -> Committed:
        """Commit one group.

        `settled`: ids of published outbox rows to remove. `lock_wait`: ms; None: the default.
        """
        try:
            outcomes, group = self._transact(commands, settled, lock_wait)
        except DatabaseGone as gone:
            self.gone = gone
            return Committed([Unavailable()] * len(commands), [])
        except _LOST as error:
            if _is_locked(error) and lock_wait is None:
                return self._commit_apart(commands)
            self.failing = not _is_locked(error)
            return Committed([_unavailable_error(error)] * len(commands), [])
        except Exception as error:
            if len(commands) > 1:  # one bad command must not make the others fail
                return self._commit_singly(commands)
            return Committed([_internal_error(error)] * len(commands), [])
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
        """Commit conversation by conversation, because a node that hangs holds the lock of one of them."""
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
            written = Transaction(connection, self._node, self._wanted).run(
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
                    raise Strayed("it is not certain that the standby has this commit")
            except Exception as error:
                # It is not known whether this was committed. So it is never retried here, and the connection,
                # which may still be inside the transaction, is never used again.
                connection.invalidate()
                raise OperationalError("COMMIT", None, error) from error
            self._file.check()
            return written

    @property
    def damaged(self) -> bool:
        """Whether SQLite has reported that its file is damaged."""
        return self._file.damaged

    def leave(self) -> None:
        """Stop using a database that is gone: see `DatabaseFile.leave`."""
        self._file.leave(self._engine)

    def look(self) -> None:
        """Check the database's file; the idle writer calls this."""
        try:
            self._file.check()
        except DatabaseGone as gone:
            self.gone = gone


def _unavailable_error(error: Exception) -> Unavailable:
    _unavailable.warn(error=primary(error) or str(getattr(error, "orig", error)))
    return Unavailable()


def _internal_error(error: Exception) -> Internal:
    incident = secrets.token_hex(6)
    if isinstance(error, DBAPIError):
        log.error("write_failed", incident=incident, error=primary(error) or type(error.orig).__name__)
    else:
        log.error("write_failed", incident=incident, exc_info=error)
    return Internal(incident=incident)


def _lock_of(command: AnyCommand) -> Any:
    """A key for the lock that a command needs: the conversation, or the message if the
    backend gives only its id.
    """
    if isinstance(command, Edit | Delete) and command.conversation_id is None:
        return "message", command.message_id
    if isinstance(command, Notify | Fence):
        return type(command).__name__
    return ("user", command.user_id) if isinstance(command, SetUser) else command.conversation_id


def _is_locked(error: Exception) -> bool:
    """Whether PostgreSQL's lock_timeout ended the wait for a row (SQLSTATE 55P03), so nothing was written."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "55P03"
