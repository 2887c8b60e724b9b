"""The way in through Redis: what a backend XADDs to `chat.ingest` is committed, in that order, once.

A batch is committed before the next is read, and taken out of the stream after. What is not certain to be
committed is tried again under the same `client_id`, so that it makes no second row.

One node reads at a time, by a lease in Redis. A lease alone does not keep the order: a reader that was paused
does not know that its own has ended, and would commit late what it holds. So a reader that begins puts a
fencing token into the database, and each of its commits checks it in the same transaction.
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

IDLE = 1.0  # seconds between looks whether another node has stopped reading
RETRY_FIRST, RETRY_MOST = 0.1, 2.0  # seconds between attempts, doubled each time, with jitter
YIELD_EVERY = 20  # entries that are checked between checkpoints: a wrong one takes some 100 µs
QUIET = 60.0  # seconds between two lines about refused entries

T = TypeVar("T")
log = structlog.get_logger()


class Consumer:
    def __init__(self, stream: IngestStream, messages: Messages) -> None:
        self._stream, self._messages = stream, messages
        self._limiter = trio.CapacityLimiter(1)
        self._refused = Recurring("ingest_refused", every=QUIET)
        self._failing = False
        self._term = 0  # of the stream's lease, in which `_fence` was put into the database
        self._fence: str | None = None
        self._fences = count(1)
        self.finished = trio.Event()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until `stop`, and the end of the batch in progress."""
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
        """From here on nobody else's entries are committed. Raises Unavailable."""
        self._fence = None
        term, fence = self._stream.term, f"{self._stream.node}:{next(self._fences)}"
        await self._messages.fence(fence)
        # After that: what was read before, somebody else may have committed meanwhile, and what follows it.
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
            command = create(decode(NewMessage, entry.payload), f"ingest:{entry.id}")
            self._messages.check(command)
        except ChatError as refusal:
            return refusal
        return replace(pack(command), fence=self._fence)

    async def _commit(self, commands: Sequence[Create]) -> list[Any] | None:
        """The outcome of each. Those that may or may not have been committed are tried until that is known.

        None when another node has begun to read meanwhile: it has these entries too.
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
