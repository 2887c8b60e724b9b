"""Commits the entries that backends XADD to `chat.ingest`, in their order and exactly once.

It commits a batch before it reads the next one, and removes the batch from the stream after
the commit. If it is not certain that an entry was committed, it tries again with the same
`client_id`, so there is never a second row.

A lease in Redis lets one node read at a time. The lease alone does not keep the order: a node that was paused
does not know that its lease has ended, and would commit its entries too late. So a node that starts to read
writes a fencing token into the database, and each of its commits checks the token in the same transaction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

import structlog
import trio
from msgspec.structs import replace

from chatd.chat.messages import Messages
from chatd.chat.posts import POST_BYTES, NewMessage, create, decode
from chatd.core.backoff import Backoff
from chatd.core.errors import BadRequest, ChatError, Superseded, TooLarge, Unavailable
from chatd.ingest.stream import Entry, IngestStream, Refusal
from chatd.observe import metrics
from chatd.observe.logs import Recurring
from chatd.store.write.commands import Create
from chatd.store.write.packing import pack

IDLE = 1.0  # seconds between two attempts to get the lease
RETRY_FIRST, RETRY_MOST = 0.1, 2.0  # seconds between attempts, doubled each time, with jitter
YIELD_EVERY = 20  # entries checked between two checkpoints: an invalid entry takes about 100 µs
QUIET = 60.0  # seconds between two log lines about refused entries


T = TypeVar("T")
log = structlog.get_logger()


class Consumer:
    def __init__(self, stream: IngestStream, messages: Messages) -> None:
        self._stream, self._messages = stream, messages
        self._limiter = trio.CapacityLimiter(1)
        self._refused = Recurring("ingest_refused", every=QUIET)
        self._failing = False
        self._term = 0  # the term of the lease for which `_fence` was written to the database
        self._fence: str | None = None
        self._fences = count(1)
        self.finished = trio.Event()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Read and commit until `stop`, and finish the batch in progress."""
        task_status.started(self.finished)
        backoff = Backoff(RETRY_FIRST, RETRY_MOST)
        while not stop.is_set():
            try:
                await self._go_on(stop)
                backoff.reset()
                self._failing = False
            except Unavailable as error:
                if not self._failing:
                    log.warning("ingest_unavailable", error=str(error))
                self._failing = True
                await _rest(backoff.next(), stop)
        with suppress(Unavailable):  # the lease ends by itself
            await self._in_thread(self._stream.release)
        self._stream.close()
        self.finished.set()

    async def _go_on(self, stop: trio.Event) -> None:
        if not self._stream.holding and not await self._in_thread(self._stream.hold):
            await _rest(IDLE * random.uniform(0.5, 1), stop)
            return
        if self._fence is None or self._term != self._stream.term:
            await self._begin()
        entries = await self._in_thread(self._stream.read)
        if entries:
            await self._take_in(entries)

    async def _begin(self) -> None:
        """Set a new fencing token: from now on no other node can commit entries. Raises Unavailable."""
        self._fence = None
        term, fence = self._stream.term, f"{self._stream.node}:{next(self._fences)}"
        await self._messages.fence(fence)
        # Only now read from the start: until the fence was set, another node may have committed pending entries
        # and later ones.
        self._stream.start_over()
        self._fence, self._term = fence, term

    async def _take_in(self, entries: Sequence[Entry]) -> None:
        checked = await self._check_all(entries)
        outcomes = await self._commit([one for one in checked if isinstance(one, Create)])
        if outcomes is None:
            return
        answers = iter(outcomes)
        done: list[Entry] = []
        refused: list[Refusal] = []
        for entry, one in zip(entries, checked, strict=True):
            outcome = one if isinstance(one, ChatError) else next(answers)
            if isinstance(outcome, ChatError):
                refused.append(Refusal(entry, outcome.code, str(outcome), _field(outcome)))
            else:
                done.append(entry)
        await self._in_thread(self._stream.settle, done, refused)
        metrics.INGESTED.inc(len(done))
        self._count(refused)

    async def _check_all(self, entries: Sequence[Entry]) -> list[Create | ChatError]:
        checked: list[Create | ChatError] = []
        for number, entry in enumerate(entries, 1):
            checked.append(self._check(entry))
            if number % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        return checked

    def _check(self, entry: Entry) -> Create | ChatError:
        try:
            if entry.payload is None:
                raise BadRequest("The entry has no field m.", field="m")
            if len(entry.payload) > POST_BYTES:
                size = len(entry.payload)
                raise TooLarge(f"The message has {size} bytes; {POST_BYTES} are allowed.", field="m")
            command = create(decode(NewMessage, entry.payload), entry.key)
            self._messages.check(command)
        except ChatError as refusal:
            return refusal
        return replace(pack(command), fence=self._fence)

    async def _commit(self, commands: Sequence[Create]) -> list[Any] | None:
        """The outcome of each command. Retries those that may or may not have been committed
        until that is known.

        None: another node has started to read, and handles these entries itself.
        """
        term = self._term
        outcomes: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))
        backoff = Backoff(RETRY_FIRST, RETRY_MOST)
        while left:
            for index, outcome in zip(left, await self._try([commands[i] for i in left]), strict=True):
                outcomes[index] = outcome
            if any(isinstance(outcome, Superseded) for outcome in outcomes):
                log.warning("ingest_superseded", entries=len(commands))
                self._fence = None
                return None
            left = [index for index in left if isinstance(outcomes[index], Unavailable)]
            if left:
                await trio.sleep(backoff.next())
                if not await self._in_thread(self._stream.hold) or self._stream.term != term:
                    return None
        return outcomes

    async def _try(self, commands: Sequence[Create]) -> Sequence[Any]:
        try:
            return await self._messages.post_all(list(commands))
        except Unavailable as error:  # nothing was queued
            return [error] * len(commands)

    def _count(self, refused: Sequence[Refusal]) -> None:
        for refusal in refused:
            metrics.INGEST_REFUSED.labels(refusal.code).inc()
        if refused:
            self._refused.warn(entries=len(refused), code=refused[0].code, field=refused[0].field)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)


def _field(error: ChatError) -> str | None:
    if isinstance(error, BadRequest) and error.errors:
        return ", ".join(error.errors)
    return error.field


async def _rest(seconds: float, stop: trio.Event) -> None:
    with trio.move_on_after(seconds):
        await stop.wait()
