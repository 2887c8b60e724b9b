"""Delivers events to the backend's webhook: at least once, from a table of their own, until it takes them.

The table is the queue: nothing is lost by a restart, and several nodes deliver side by side, each what it has
claimed. A backend that is down is asked less and less often.
"""

from __future__ import annotations

import random
from collections import deque

import structlog
import trio

from chatd import calls, metrics
from chatd.config import Webhooks as Settings
from chatd.errors import Unavailable
from chatd.fetch import Fetcher
from chatd.limits import TokenBucket
from chatd.store.webhooks import Failed, Waiting
from chatd.store.webhooks import Webhooks as Table

AT_ONCE = 8  # calls on their way
CLAIM = 64  # events of one claim, each in its turn
WORK = 5.0  # seconds after which no further call of a claim is begun: what a killed node had is soon free again
SETTLE = 5.0  # seconds that the database may need to note what became of them
LOOK = 2.0  # seconds between looks for what other nodes left, and for what is due again
COUNT = 15.0  # seconds between counts of what waits
RETRY_FIRST, RETRY_MOST = 1.0, 3600.0  # seconds between attempts, doubled each time, with jitter
FAILURES = 5  # in a row, then the backend is left alone for
REST_FIRST, REST_MOST = 1.0, 30.0  # seconds, doubled each time, with jitter; then one call is tried
QUIET = 60.0  # seconds between two lines about the same trouble
GONE = 410  # the backend does not want this one, ever

log = structlog.get_logger()


class Webhooks:
    def __init__(self, settings: Settings, table: Table, fetch: Fetcher) -> None:
        self._settings, self._table, self._fetch = settings, table, fetch
        self._wake = trio.Event()
        self._failures = self._rests = 0  # in a row
        self._said = False  # that it fails
        self._failed_lines = TokenBucket(rate=1 / QUIET, burst=1, now=0)
        self._given_up_lines = TokenBucket(rate=1 / QUIET, burst=1, now=0)
        self._counted_at = -COUNT
        self.full = False  # more waits than is kept of what can be done without
        self.finished = trio.Event()

    def wake(self) -> None:
        """Something was committed that is to be delivered."""
        self._wake.set()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until `stop`, and the end of the calls on their way."""
        task_status.started()
        while not stop.is_set():
            try:
                claimed = await self._deliver_some(stop)
                await self._count()
            except Unavailable:  # the writer says loudly enough that the database is gone
                claimed = 0
            await self._rest(claimed, stop)
        self.finished.set()

    async def _deliver_some(self, stop: trio.Event) -> int:
        self._wake = trio.Event()
        most = CLAIM if self._failures < FAILURES else 1  # one is enough to see whether the backend is back
        left = deque(await self._table.claim(most, WORK + self._settings.timeout + SETTLE))
        claimed = len(left)
        until = trio.current_time() + WORK
        done: list[int] = []
        failed: list[Failed] = []
        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_ONCE, claimed)):
                nursery.start_soon(self._deliver_each, left, done, failed, until, stop)
        if claimed:
            await self._table.settle(done, failed, [one.id for one in left])
        return claimed

    async def _deliver_each(
        self, left: deque[Waiting], done: list[int], failed: list[Failed], until: float, stop: trio.Event
    ) -> None:
        """What is still left when time is over, after a stop, or when the backend fails, goes back untried."""
        while left:
            one = left.popleft()
            error = await self._deliver(one)
            if error is None:
                self._succeed(one)
                done.append(one.id)
            else:
                failed.append(self._fail(one, error))
            if stop.is_set() or self._failures >= FAILURES or trio.current_time() > until:
                return

    async def _deliver(self, one: Waiting) -> str | None:
        """What was wrong, if anything."""
        given = calls.headers(self._settings.secret, one.event, one.body, **{"X-Chatd-Delivery": str(one.id)})
        url, within = self._settings.url, self._settings.timeout
        try:
            answer = await self._fetch("POST", url, within=within, headers=given, content=one.body, whole=False)
        except Unavailable as error:
            return str(error)
        return None if 200 <= answer.status < 300 else f"HTTP {answer.status}"

    def _succeed(self, one: Waiting) -> None:
        metrics.WEBHOOKS_SENT.labels(one.event).inc()
        self._failures = self._rests = 0
        if self._said:
            self._said = False
            log.info("webhook_works_again")

    def _fail(self, one: Waiting, error: str) -> Failed:
        metrics.WEBHOOKS_FAILED.inc()
        self._failures += 1
        if not self._said and not self._failed_lines.take(trio.current_time()):
            self._said = True
            log.warning("webhook_failed", error=error)
        if error != f"HTTP {GONE}" and one.attempts + 1 < self._settings.attempts:
            delay = min(RETRY_FIRST * 2**one.attempts, RETRY_MOST)
            return Failed(one.id, error, delay * random.uniform(0.75, 1.25))
        self._counted_at = -COUNT  # it shall be seen soon
        if not self._given_up_lines.take(trio.current_time()):
            log.error("webhook_given_up", id=one.id, of=one.event, attempts=one.attempts + 1, error=error)
        return Failed(one.id, error, None)

    async def _rest(self, claimed: int, stop: trio.Event) -> None:
        if claimed and self._failures >= FAILURES:
            seconds = min(REST_FIRST * 2 ** min(self._rests, 10), REST_MOST)
            self._rests += 1
            with trio.move_on_after(seconds * random.uniform(0.5, 1)):
                await stop.wait()
        elif not claimed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_for, self._wake, nursery.cancel_scope)
                nursery.start_soon(_wait_for, stop, nursery.cancel_scope)
                nursery.cancel_scope.deadline = trio.current_time() + LOOK

    async def _count(self) -> None:
        if trio.current_time() - self._counted_at < COUNT:
            return
        self._counted_at = trio.current_time()
        waiting, dead = await self._table.counts()
        metrics.WEBHOOKS_WAITING.set(waiting)
        metrics.WEBHOOKS_DEAD.set(dead)
        self.full = waiting > self._settings.kept


async def _wait_for(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
