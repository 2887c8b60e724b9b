"""The writer: takes the waiting commands, commits them as one group in a thread, and wakes the callers.

`chat` submits commands, `transaction` executes them. The writer passes each committed group to `on_commit`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import structlog
import trio
from sqlalchemy import Engine

from chatd.core.errors import Unavailable
from chatd.core.model import Group
from chatd.observe import metrics
from chatd.store.database_file import DatabaseFile
from chatd.store.queues.outbox import Settled
from chatd.store.sessions import Sessions
from chatd.store.write.commands import AnyCommand, Create
from chatd.store.write.committer import Committer
from chatd.store.write.submission import Submission, Then

GROUP = 500  # commands per commit; larger groups gain nothing per command and make callers wait longer
# Limits of the queue: enough for a few seconds of a slow disk, and bounded memory.
QUEUE = 10_000  # commands
QUEUE_BYTES = 32 * 1024 * 1024  # bytes of memory of these commands
GROUP_BYTES = 2 * 1024 * 1024  # bytes per commit: during it `meta` is decoded and takes many times as much
DEADLINE = 15.0  # seconds that a caller waits; longer than the database's own timeouts
OVERDUE_TICK = 0.5  # seconds between two checks for callers that have waited longer than that
# Seconds after which an idle writer removes published outbox rows, retries a failed database, checks its file.
SETTLE_AFTER = 2.0
LAST_ANSWERS = 0.2  # seconds for the last answers to go out before the process ends without a database

log = structlog.get_logger()


class Writer:
    """The writer.

    `failing`: the last write found no database that accepts one; the idle writer keeps trying.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        node: str | None,
        on_commit: Callable[[Group], None],
        wanted: frozenset[str] = frozenset(),
        sessions: Sessions,
        file: DatabaseFile,
        settled: Settled,
    ) -> None:
        """`node`: the node's name in the outbox; None: no outbox. `wanted`: the events that the webhook wants.

        `file`: must still be in place before and after each commit. `settled`: published outbox rows, which the
        next commit removes.
        """
        self._committer = Committer(engine, node=node, wanted=wanted, file=file)
        self._on_commit, self._sessions = on_commit, sessions
        self._waiting: deque[Submission] = deque()
        self._committing: list[Submission] = []
        self._committing_since: float | None = None
        self._count = self._bytes = 0
        self._settled = settled
        self._thread = trio.CapacityLimiter(1)
        self._wake = trio.Event()
        self._closed = False
        self.finished = trio.Event()

    @property
    def failing(self) -> bool:
        return self._committer.failing

    @property
    def damaged(self) -> bool:
        return self._committer.damaged

    def submit(self, commands: Sequence[AnyCommand], then: Then | None = None) -> Submission:
        """Queue commands, in the order of the calls. Raises Unavailable if too many are waiting.

        The writer's task calls `then` with the outcomes, so it must be quick and must not block. A task per
        caller would be simpler, but would double the cost of a write.
        """
        if self._closed:
            raise Unavailable("the daemon is stopping")
        submission = Submission(commands, then, DEADLINE)
        count, memory = self._count + len(commands), self._bytes + submission.bytes
        if self._waiting and (count > QUEUE or memory > QUEUE_BYTES):
            raise Unavailable("too many writes are waiting")
        self._waiting.append(submission)
        self._count, self._bytes = count, memory
        self._wake.set()
        return submission

    def close(self) -> None:
        """Accept no more commands. `finished` is set after the last group is committed."""
        self._closed = True
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_overdue)
            nursery.start_soon(self._look_around)
            task_status.started()
            await self._run()
            nursery.cancel_scope.cancel()
        if self._committer.gone is not None:
            raise self._committer.gone

    async def _run(self) -> None:
        while True:
            while self._waiting and self._committer.gone is None:
                await self._commit_group(self._take())
            if self._committer.gone is not None:
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
                await trio.to_thread.run_sync(self._committer.look, limiter=self._thread)
        if self._settled:
            await self._commit_group([])
        self.finished.set()

    async def _give_up(self) -> None:
        """The database is gone: answer all waiting callers with Unavailable before the process ends."""
        log.error("database_gone", error=str(self._committer.gone))
        self._closed = True
        while self._waiting:
            for submission in self._take():
                submission.resolve([Unavailable()] * len(submission.commands))
        await trio.to_thread.run_sync(self._committer.leave, limiter=self._thread)
        await trio.sleep(LAST_ANSWERS)

    async def _give_up_overdue(self) -> None:
        """Answer overdue callers with Unavailable. Their commands stay queued and may still be committed."""
        while True:
            await trio.sleep(OVERDUE_TICK)
            now = trio.current_time()
            for submission in [*self._committing, *self._waiting]:
                if submission.deadline > now:
                    break
                submission.resolve([Unavailable()] * len(submission.commands))

    async def _look_around(self) -> None:
        """Check for a failover if a commit hangs, so that a commit on a replaced server
        fails instead of waiting.
        """
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
        committed = await trio.to_thread.run_sync(
            self._committer.commit, commands, settled, limiter=self._thread
        )
        self._committing_since = None
        outcomes = committed.outcomes
        if not committed.settled:
            self._settled.add(settled)
        metrics.COMMIT_SECONDS.observe(trio.current_time() - started)
        metrics.count_outcomes(metrics.COMMANDS, outcomes)
        created = [o for c, o in zip(commands, outcomes, strict=True) if isinstance(c, Create)]
        metrics.count_outcomes(metrics.POSTED, created)
        for group in committed.groups:
            if group.changes or group.members or group.users or group.notices or group.hooked:
                self._on_commit(group)
        answers = iter(outcomes)
        for submission in submissions:
            submission.resolve([next(answers) for _ in submission.commands])
        self._committing = []
