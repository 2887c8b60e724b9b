"""The one writer: takes what waits, commits it as one group in a thread, wakes the callers.

Above it, `chat` submits commands; below, `transaction` writes them. Commits are what `on_commit` is told of.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import trio
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chatd.core.errors import ChatError, DatabaseGone, Internal, Unavailable
from chatd.core.model import Group, now
from chatd.observe import metrics
from chatd.observe.logs import Recurring
from chatd.store.database_file import DatabaseFile
from chatd.store.queues.outbox import Settled
from chatd.store.sessions import Sessions, Strayed, strayed, unreplicated
from chatd.store.write import statements
from chatd.store.write.commands import AnyCommand, Create, Delete, Edit, Fence, Notify, Result, SetUser
from chatd.store.write.packing import pack, size, unpack
from chatd.store.write.transaction import Transaction

GROUP = 500  # commands in one commit: beyond it the gain per command is gone and the wait grows
# What may wait: a few seconds of a slow disk, and no more memory than a daemon can spare.
QUEUE = 10_000  # commands, and
QUEUE_BYTES = 32 * 1024 * 1024  # of memory, all that is in them
GROUP_BYTES = 2 * 1024 * 1024  # of one commit: for its time `meta` is decoded, and takes many times as much
DEADLINE = 15.0  # seconds a caller waits; longer than the database's own deadlines
OVERDUE_TICK = 0.5  # seconds between looks at who has waited for so long
APART_WAIT = 100  # ms for a conversation's lock, once some of a group could not be had in time
# Seconds an idle writer leaves published outbox rows lying, a failed database untried, or its file unwatched.
SETTLE_AFTER = 2.0
GOODBYE = 0.2  # seconds for answers on their way, before the process ends for want of a database

# The server is gone, overloaded or locked. What was sent may or may not have been committed. A bare OSError is
# psycopg's, where there is no descriptor left to connect with.
_LOST = (OperationalError, InterfaceError, InternalError, PoolTimeout, Strayed, OSError)

Outcome = Result | ChatError
Then = Callable[[Sequence[Outcome]], None]
log = structlog.get_logger()
_unavailable = Recurring("write_unavailable")


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


class Submission:
    """Commands on their way. They are committed whole or not at all, whoever waits for them or not.

    Its outcomes come once: from the commit, or from the writer's clock when that takes too long.
    """

    __slots__ = ("_done", "_outcomes", "_then", "bytes", "commands", "deadline")

    def __init__(self, commands: Sequence[AnyCommand], then: Then | None) -> None:
        self.commands = [pack(command) for command in commands]
        self.bytes = sum(map(size, self.commands))
        self.deadline = trio.current_time() + DEADLINE
        self._outcomes: Sequence[Outcome] | None = None
        self._then = then
        self._done: trio.Event | None = None  # made by who waits

    def resolve(self, outcomes: Sequence[Outcome]) -> None:
        if self._outcomes is not None:
            return
        self._outcomes = outcomes
        if self._done is not None:
            self._done.set()
        if self._then is not None:
            try:
                self._then(outcomes)
            except Exception as error:  # of one client: the writer has others
                log.error("answer_failed", exc_info=error)

    async def outcomes(self) -> Sequence[Outcome]:
        """One for each command; Unavailable past the deadline, when the outcome is unknown."""
        if self._outcomes is None:
            self._done = self._done or trio.Event()
            await self._done.wait()
        assert self._outcomes is not None
        return self._outcomes

    async def outcome(self) -> Result:
        """The outcome of a single command, raised if it is an error."""
        (outcome,) = await self.outcomes()
        if isinstance(outcome, ChatError):
            raise outcome
        return outcome


class Writer:
    """`failing`: the last write found no database that takes any. It is tried again also when nobody writes."""

    def __init__(
        self,
        engine: Engine,
        *,
        node: str | None,
        on_commit: Callable[[Group], None],
        told: frozenset[str] = frozenset(),
        sessions: Sessions,
        file: DatabaseFile,
        settled: Settled,
    ) -> None:
        """`node`: fill the outbox under this name; None: no outbox. `told`: events that the webhook wants.
        `file`: the file that must still be there after a commit. `settled`: outbox rows that go with the next.
        """
        self._file = file
        self._gone: DatabaseGone | None = None
        self._engine, self._node, self._on_commit, self._told = engine, node, on_commit, told
        self._sessions = sessions
        self._waiting: deque[Submission] = deque()
        self._committing: list[Submission] = []
        self._committing_since: float | None = None
        self._count = self._bytes = 0
        self.failing = False
        self._settled = settled
        self._thread = trio.CapacityLimiter(1)
        self._wake = trio.Event()
        self._closed = False
        self.finished = trio.Event()

    def submit(self, commands: Sequence[AnyCommand], then: Then | None = None) -> Submission:
        """Queue commands, in the order of the calls. Raises Unavailable when too many wait already.

        `then` is told of the outcomes, by the writer's own task: it neither waits nor takes long. A task of its
        own for each of many would cost as much as all the rest of a write.
        """
        if self._closed:
            raise Unavailable("the daemon is stopping")
        submission = Submission(commands, then)
        count, memory = self._count + len(commands), self._bytes + submission.bytes
        if self._waiting and (count > QUEUE or memory > QUEUE_BYTES):
            raise Unavailable("too many writes are waiting")
        self._waiting.append(submission)
        self._count, self._bytes = count, memory
        self._wake.set()
        return submission

    def close(self) -> None:
        """Take nothing more; `finished` is set when the last group is committed."""
        self._closed = True
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_overdue)
            nursery.start_soon(self._look_around)
            task_status.started()
            await self._run()
            nursery.cancel_scope.cancel()
        if self._gone is not None:
            raise self._gone

    async def _run(self) -> None:
        while True:
            while self._waiting and self._gone is None:
                await self._commit_group(self._take())
            if self._gone is not None:
                await self._give_up()
                return
            if self._closed:
                break
            self._wake = trio.Event()
            with trio.move_on_after(SETTLE_AFTER):
                await self._wake.wait()
            if not self._waiting and (self._settled or self.failing):
                await self._commit_group([])
            if not self._waiting:
                await trio.to_thread.run_sync(self._look, limiter=self._thread)
        if self._settled:
            await self._commit_group([])
        self.finished.set()

    async def _give_up(self) -> None:
        """There is no database to commit to: whoever waits is told, while there is somebody to tell it."""
        log.error("database_gone", error=str(self._gone))
        self._closed = True
        while self._waiting:
            for submission in self._take():
                submission.resolve([Unavailable()] * len(submission.commands))
        await trio.to_thread.run_sync(self._file.leave, self._engine, limiter=self._thread)
        await trio.sleep(GOODBYE)

    async def _give_up_overdue(self) -> None:
        """They stay where they are, and are committed when the database can: the outcome is unknown."""
        while True:
            await trio.sleep(OVERDUE_TICK)
            now = trio.current_time()
            for submission in [*self._committing, *self._waiting]:
                if submission.deadline > now:
                    break
                submission.resolve([Unavailable()] * len(submission.commands))

    async def _look_around(self) -> None:
        """What hangs on a server that another one has replaced is cut off, and fails."""
        while True:
            await trio.sleep(OVERDUE_TICK)
            since = self._committing_since
            if since is not None and trio.current_time() - since > DEADLINE:
                self._sessions.doubt()
            if self._sessions.doubted:
                await trio.to_thread.run_sync(self._sessions.look, abandon_on_cancel=True)

    def _take(self) -> list[Submission]:
        taken: list[Submission] = []
        count = memory = 0
        while self._waiting:
            following = self._waiting[0]
            count, memory = count + len(following.commands), memory + following.bytes
            if taken and (count > GROUP or memory > GROUP_BYTES):
                break
            taken.append(self._waiting.popleft())
            self._count -= len(following.commands)
            self._bytes -= following.bytes
        return taken

    async def _commit_group(self, submissions: list[Submission]) -> None:
        self._committing = submissions
        commands = [command for submission in submissions for command in submission.commands]
        settled = self._settled.take()
        started = self._committing_since = trio.current_time()
        outcomes, groups, settled_now = await trio.to_thread.run_sync(
            self._commit, commands, settled, limiter=self._thread
        )
        self._committing_since = None
        if not settled_now:
            self._settled.add(settled)
        metrics.COMMIT_SECONDS.observe(trio.current_time() - started)
        metrics.count_outcomes(metrics.COMMANDS, outcomes)
        created = [o for c, o in zip(commands, outcomes, strict=True) if isinstance(c, Create)]
        metrics.count_outcomes(metrics.POSTED, created)
        for group in groups:
            if group.changes or group.members or group.users or group.notices or group.hooked:
                self._on_commit(group)
        answers = iter(outcomes)
        for submission in submissions:
            submission.resolve([next(answers) for _ in submission.commands])
        self._committing = []

    # In the thread.

    def _commit(
        self, commands: list[AnyCommand], settled: set[int], lock_wait: int | None = None
    ) -> tuple[list[Outcome], list[Group], bool]:
        """`lock_wait` in ms, if not as long as usual."""
        try:
            outcomes, group = self._transact(commands, settled, lock_wait)
        except DatabaseGone as gone:
            self._gone = gone
            return [Unavailable()] * len(commands), [], False
        except _LOST as error:
            if _is_locked(error) and lock_wait is None:
                return self._commit_apart(commands)
            self.failing = not _is_locked(error)
            return [self._lost(error)] * len(commands), [], False
        except Exception as error:
            if len(commands) > 1:  # one of them is bad: the others shall not suffer
                return self._commit_singly(commands)
            return [self._bad(error)] * len(commands), [], False
        self.failing = False
        return outcomes, [group], True

    def _commit_singly(self, commands: list[AnyCommand]) -> tuple[list[Outcome], list[Group], bool]:
        outcomes: list[Outcome] = []
        groups: list[Group] = []
        for command in commands:
            (outcome,), group, _ = self._commit([command], set())
            outcomes.append(outcome)
            groups += group
        return outcomes, groups, False

    def _commit_apart(self, commands: list[AnyCommand]) -> tuple[list[Outcome], list[Group], bool]:
        """A node that does not move holds the lock of a conversation: the others do not wait for it."""
        by_lock: dict[Any, list[int]] = {}
        for index, command in enumerate(commands):
            by_lock.setdefault(_lock_of(command), []).append(index)
        outcomes: list[Outcome] = [Unavailable()] * len(commands)
        groups: list[Group] = []
        for indexes in by_lock.values():
            found, group, _ = self._commit([commands[index] for index in indexes], set(), APART_WAIT)
            groups += group
            for index, outcome in zip(indexes, found, strict=True):
                outcomes[index] = outcome
        return outcomes, groups, False

    def _transact(
        self, commands: list[AnyCommand], settled: set[int], lock_wait: int | None
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

    def _look(self) -> None:
        """For when nobody writes."""
        try:
            self._file.check()
        except DatabaseGone as gone:
            self._gone = gone

    @staticmethod
    def _lost(error: Exception) -> Unavailable:
        _unavailable.warn(error=str(getattr(error, "orig", error)))
        return Unavailable()

    @staticmethod
    def _bad(error: Exception) -> Internal:
        incident = secrets.token_hex(6)
        if isinstance(error, DBAPIError):
            # Not all that the driver says: its details show the row, and with it the message.
            primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
            log.error("write_failed", incident=incident, error=primary or type(error.orig).__name__)
        else:
            log.error("write_failed", incident=incident, exc_info=error)
        return Internal(incident=incident)
