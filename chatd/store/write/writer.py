"""The one writer: takes what waits, commits it as one group in a thread, wakes the callers.

Above it, `chat` submits commands; below, `transaction` writes them. Commits are what `on_commit` is told of.
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

GROUP = 500  # commands in one commit: beyond it the gain per command is gone and the wait grows
# What may wait: a few seconds of a slow disk, and no more memory than a daemon can spare.
QUEUE = 10_000  # commands, and
QUEUE_BYTES = 32 * 1024 * 1024  # of memory, all that is in them
GROUP_BYTES = 2 * 1024 * 1024  # of one commit: for its time `meta` is decoded, and takes many times as much
DEADLINE = 15.0  # seconds a caller waits; longer than the database's own deadlines
OVERDUE_TICK = 0.5  # seconds between looks at who has waited for so long
# Seconds an idle writer leaves published outbox rows lying, a failed database untried, or its file unwatched.
SETTLE_AFTER = 2.0
GOODBYE = 0.2  # seconds for answers on their way, before the process ends for want of a database

log = structlog.get_logger()


class Writer:
    """While the last write found no database that takes any, it is tried again also when nobody writes:
    `failing`.
    """

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
        self._committer = Committer(engine, node=node, told=told, file=file)
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
        """Queue commands, in the order of the calls. Raises Unavailable when too many wait already.

        `then` is told of the outcomes, by the writer's own task: it neither waits nor takes long. A task of its
        own for each of many would cost as much as all the rest of a write.
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
        """There is no database to commit to: whoever waits is told, while there is somebody to tell it."""
        log.error("database_gone", error=str(self._committer.gone))
        self._closed = True
        while self._waiting:
            for submission in self._take():
                submission.resolve([Unavailable()] * len(submission.commands))
        await trio.to_thread.run_sync(self._committer.leave, limiter=self._thread)
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
