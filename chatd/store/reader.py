"""Reads in threads: `Reader` runs one, `Gathered` answers many requests for the same with one.

Above them, `chat` asks; what is read are the plain functions of `reads` and `snapshots`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import trio
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chatd import metrics
from chatd.errors import Unavailable
from chatd.logs import Recurring
from chatd.store.sessions import Strayed, strayed

DEADLINE = 10.0  # seconds; a read that takes longer is given up, its thread ends when the driver does
AT_ONCE = 2  # gathered reads on their way: one that takes long does not hold up all the others
GATHER = 0.005  # seconds to wait for others, if the last came no longer ago: a crowd is on its way
GATHERED = 200  # the weight of one of them: 10 ms of SQL, some of which keeps the loop from the interpreter

_LOST = (DBAPIError, PoolTimeout, Strayed, OSError)  # the last: there is no descriptor left to connect with

T = TypeVar("T")
Request = TypeVar("Request")
Answer = TypeVar("Answer")

_unavailable = Recurring("read_unavailable")


class Reader:
    """Runs reads in threads, as many at once as there are connections, so that waiting is cancellable."""

    def __init__(self, engine: Engine, readers: int, overdue: Callable[[], None] = lambda: None) -> None:
        """`overdue` is told of reads that took too long."""
        self._engine, self._overdue = engine, overdue
        self._limiter = trio.CapacityLimiter(readers)

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        """`read(connection, *arguments)` in one snapshot. Raises Unavailable."""
        started = trio.current_time()
        try:
            with trio.move_on_after(DEADLINE):
                return await trio.to_thread.run_sync(
                    self._run, read, arguments, limiter=self._limiter, abandon_on_cancel=True
                )
        finally:
            metrics.READ_SECONDS.observe(trio.current_time() - started)
        self._overdue()
        raise Unavailable()

    @property
    def in_use(self) -> int:
        """Connections that read just now."""
        return self._limiter.borrowed_tokens

    def _run(self, read: Callable[..., T], arguments: tuple[Any, ...], again: bool = True) -> T:
        try:
            with self._engine.connect() as connection:
                answer = read(connection, *arguments)
                if strayed(connection):
                    raise Strayed
                return answer
        except _LOST as error:
            # A pooled connection that died while idle says so at its first use; a read can be repeated.
            ended = isinstance(error, Strayed) or getattr(error, "connection_invalidated", False)
            if again and ended:
                return self._run(read, arguments, again=False)
            _unavailable.warn(read=read.__name__, error=type(getattr(error, "orig", error)).__name__)
            raise Unavailable() from error


class _Turn(Generic[Request, Answer]):
    """A request that waits. `come` is set when it is over, or when its task is the one to read next."""

    __slots__ = ("alone", "answer", "come", "failed", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.answer: Answer | None = None
        self.failed = self.alone = False
        self.come = trio.Event()

    @property
    def over(self) -> bool:
        return self.answer is not None or self.failed or self.alone


class Gathered(Generic[Request, Answer]):
    """One read for all requests that came while another was on its way, as the writer commits in groups.

    A transaction and a thread cost more than what one login reads: when thousands come back at once, dozens
    share them. Whoever finds no read on its way begins one, in its own task; if that is cancelled, another of
    those who wait begins again. At most one request of each connection waits.
    """

    def __init__(
        self,
        read: Reader,
        many: Callable[[Connection, Sequence[Request]], Sequence[Answer]],
        weight: Callable[[Request], int],
    ) -> None:
        """`many` answers each request, in their order; an answer is never None."""
        self._read, self._many, self._weight = read, many, weight
        self._queue: deque[_Turn[Request, Answer]] = deque()
        self._on_their_way = 0
        self._last_asked = -GATHER

    async def __call__(self, request: Request) -> Answer:
        """Raises Unavailable, or what `many` raises for this request alone."""
        mine: _Turn[Request, Answer] = _Turn(request)
        self._queue.append(mine)
        now, before = trio.current_time(), self._last_asked
        self._last_asked = now
        try:
            with trio.move_on_after(DEADLINE):
                if now - before < GATHER:
                    await trio.sleep(GATHER)
                while not mine.over:
                    if self._queue and self._on_their_way < AT_ONCE:
                        await self._read_next()
                    else:
                        mine.come = trio.Event()
                        await mine.come.wait()
        finally:
            if not mine.over and mine in self._queue:
                self._queue.remove(mine)
            self._pass_on()
        if mine.alone:
            (mine.answer,) = await self._read(self._many, [request])
        if mine.answer is None:
            raise Unavailable()
        return mine.answer

    async def _read_next(self) -> None:
        taken = self._take()
        self._on_their_way += 1
        try:
            answers = await self._read(self._many, [turn.request for turn in taken])
            for turn, answer in zip(taken, answers, strict=True):
                turn.answer = answer
        except Unavailable:
            for turn in taken:
                turn.failed = True
        except Exception:  # one of them is bad: the others shall not suffer
            for turn in taken:
                turn.alone = True
        finally:
            self._on_their_way -= 1
            for turn in taken:
                turn.come.set()
            self._queue.extendleft(turn for turn in reversed(taken) if not turn.over)  # we were cancelled

    def _take(self) -> list[_Turn[Request, Answer]]:
        taken = [self._queue.popleft()]
        weight = self._weight(taken[0].request)
        while self._queue and (weight := weight + self._weight(self._queue[0].request)) <= GATHERED:
            taken.append(self._queue.popleft())
        return taken

    def _pass_on(self) -> None:
        if self._queue and self._on_their_way < AT_ONCE:
            self._queue[0].come.set()
