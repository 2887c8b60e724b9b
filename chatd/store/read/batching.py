"""Answers many requests for the same kind of read with few transactions, and fairly.

Users take turns, and a user whose requests take long has to wait while others get theirs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

import trio
from sqlalchemy import Connection

from chatd.core.errors import Unavailable
from chatd.store.read.reader import DEADLINE, Reader

AT_ONCE = 2  # batches that are read at the same time, so that a slow one does not delay all others
GATHER = 0.005  # seconds that a request waits for others if one came within the same time before it
BATCH_WEIGHT = 200  # largest weight of a batch: about 10 ms of SQL, part of which holds the GIL

SHARE = 0.25  # share of one reader's time that a user may take in the long run
FREE = 0.25  # seconds of a reader's time that a user may take at once
DEBT_MOST = 1.0  # seconds; bounds a user's wait after a time in which the database was slow
DEBTORS = 1000  # from this number of users on, those without a debt are removed
NEGLIGIBLE = 0.001  # seconds; shorter reads are free

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class _Turn(Generic[Request, Answer]):
    """A waiting request. `woken` is set when it has a result, or when its task should read the next batch.

    `failed`: the read ended with Unavailable. `alone`: the batch failed, so the request must be read by itself.
    """

    __slots__ = ("alone", "answer", "failed", "owner", "request", "weight", "woken")

    def __init__(self, request: Request, owner: int, weight: int) -> None:
        self.request, self.owner, self.weight = request, owner, weight
        self.answer: Answer | None = None
        self.failed = self.alone = False
        self.woken = trio.Event()

    @property
    def over(self) -> bool:
        return self.answer is not None or self.failed or self.alone


class _Debts:
    """The reader time that each user has taken, minus `SHARE` of the time that has passed since."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[float, float]] = {}  # user → (debt in seconds, the time of that value)

    def wait(self, owner: int, now: float) -> float:
        """Seconds until this user may read again; 0.0: now."""
        return max(0.0, (self._now(owner, now) - FREE) / SHARE) if owner in self._of else 0.0

    def charge(self, owner: int, seconds: float, now: float) -> None:
        if seconds < NEGLIGIBLE:
            return
        self._of[owner] = (min(DEBT_MOST, self._now(owner, now) + seconds), now)
        if len(self._of) > DEBTORS:
            self._of = {one: debt for one, debt in self._of.items() if self._now(one, now) > 0}

    def _now(self, owner: int, now: float) -> float:
        debt, then = self._of.get(owner, (0.0, now))
        return max(0.0, debt - (now - then) * SHARE)


class _Shared(NamedTuple):
    """Equal requests of one user, which share one answer."""

    first: _Turn[Any, Any]
    turns: list[_Turn[Any, Any]]


class _Queue:
    """The waiting requests, by user. Each user has at most one request in a running read."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, deque[_Turn[Any, Any]]] = OrderedDict()
        self._reading: set[int] = set()
        self._debts = _Debts()

    def add(self, turn: _Turn[Any, Any]) -> None:
        self._waiting.setdefault(turn.owner, deque()).append(turn)

    def put_back(self, turns: Sequence[_Turn[Any, Any]]) -> None:
        for turn in reversed(turns):
            self._waiting.setdefault(turn.owner, deque()).appendleft(turn)
            self._waiting.move_to_end(turn.owner, last=False)

    def remove(self, turn: _Turn[Any, Any]) -> None:
        turns = self._waiting.get(turn.owner)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[turn.owner]

    def seconds_to_wait(self, owner: int) -> float:
        """Seconds after which the user's debt allows a read; infinity if another event must wake it."""
        return self._debts.wait(owner, trio.current_time()) or inf

    def next(self) -> _Turn[Any, Any] | None:
        now = trio.current_time()
        return next((turns[0] for owner, turns in self._waiting.items() if self._may_read(owner, now)), None)

    def take(self) -> list[_Shared]:
        """Take the next batch: one request of each user in turn, up to the weight `BATCH_WEIGHT`."""
        now = trio.current_time()
        taken: list[_Shared] = []
        passed: list[tuple[int, deque[_Turn[Any, Any]]]] = []
        weight = 0
        while self._waiting:
            owner, turns = self._waiting.popitem(last=False)
            if not self._may_read(owner, now):
                passed.append((owner, turns))
                continue
            if taken and weight + turns[0].weight > BATCH_WEIGHT:
                passed.append((owner, turns))
                break
            weight += turns[0].weight
            taken.append(self._take_of(owner, turns))
        for owner, turns in reversed(passed):
            self._waiting[owner] = turns
            self._waiting.move_to_end(owner, last=False)
        self._reading.update(one.first.owner for one in taken)
        return taken

    def _take_of(self, owner: int, turns: deque[_Turn[Any, Any]]) -> _Shared:
        first = turns[0]
        same = [turn for turn in turns if turn is first or turn.request == first.request]
        rest = deque(turn for turn in turns if turn not in same)
        if rest:
            self._waiting[owner] = rest
        return _Shared(first, same)

    def done(self, taken: Sequence[_Shared], seconds: float) -> None:
        now, weight = trio.current_time(), sum(one.first.weight for one in taken)
        for one in taken:
            self._reading.discard(one.first.owner)
            self._debts.charge(one.first.owner, seconds * one.first.weight / weight, now)

    def _may_read(self, owner: int, now: float) -> bool:
        return owner not in self._reading and not self._debts.wait(owner, now)


class Batcher(Generic[Request, Answer]):
    """Answers all requests that arrive during a running read with the next read, as the
    writer commits in groups.

    A transaction and a thread cost more than the queries of one login, so when thousands of clients reconnect,
    dozens of logins share them. There is no task for the reading: a request that finds no read running starts
    one in its own task. If that task is cancelled, another waiting request starts over. Each connection has at
    most one waiting request.
    """

    def __init__(
        self,
        read: Reader,
        many: Callable[[Connection, Sequence[Request]], Sequence[Answer]],
        weight: Callable[[Request], int],
        owner: Callable[[Request], int],
    ) -> None:
        """`many` answers requests in their order, each with an answer that is not None.

        `owner` returns the user.
        """
        self._read, self._many, self._weight, self._owner = read, many, weight, owner
        self._queue = _Queue()
        self._on_their_way = 0
        self._last_asked = -GATHER

    async def __call__(self, request: Request) -> Answer:
        """The answer to a request.

        Raises Unavailable, and what `many` raises if it reads this request alone.
        """
        mine: _Turn[Request, Answer] = _Turn(request, self._owner(request), self._weight(request))
        self._queue.add(mine)
        now, before = trio.current_time(), self._last_asked
        self._last_asked = now
        try:
            with trio.move_on_after(DEADLINE):
                if now - before < GATHER:
                    await trio.sleep(GATHER)
                while not mine.over:
                    if self._on_their_way < AT_ONCE and (taken := self._queue.take()):
                        await self._read_these(taken)
                    else:
                        mine.woken = trio.Event()
                        with trio.move_on_after(self._queue.seconds_to_wait(mine.owner)):
                            await mine.woken.wait()
        finally:
            self._queue.remove(mine)
            self._pass_on()
        if mine.alone:
            (mine.answer,) = await self._read(self._many, [request])
        if mine.answer is None:
            raise Unavailable()
        return mine.answer

    async def _read_these(self, taken: Sequence[_Shared]) -> None:
        started = trio.current_time()
        self._on_their_way += 1
        try:
            answers = await self._read(self._many, [one.first.request for one in taken])
            for one, answer in zip(taken, answers, strict=True):
                for turn in one.turns:
                    turn.answer = answer
        except Unavailable:
            for turn in _turns(taken):
                turn.failed = True
        except Exception:  # one request made the batch fail: read each by itself
            for turn in _turns(taken):
                turn.alone = True
        finally:
            self._on_their_way -= 1
            self._queue.done(taken, trio.current_time() - started)
            for turn in _turns(taken):
                turn.woken.set()
            self._queue.put_back([turn for turn in _turns(taken) if not turn.over])  # this task was cancelled

    def _pass_on(self) -> None:
        if self._on_their_way < AT_ONCE and (turn := self._queue.next()):
            turn.woken.set()


def _turns(taken: Sequence[_Shared]) -> Iterator[_Turn[Any, Any]]:
    for one in taken:
        yield from one.turns
