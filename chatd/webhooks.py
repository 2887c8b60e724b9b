"""Delivers events to the backend's webhook: at least once, from a table of their own, until it takes them.

The table is the queue: nothing is lost by a restart, and several nodes deliver side by side, each what it has
claimed. A backend that is down is asked less and less often.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import structlog
import trio

from chatd import metrics
from chatd.chat.calls import headers
from chatd.config import Webhooks as Settings
from chatd.errors import Unavailable
from chatd.fetch import Fetcher
from chatd.store.webhooks import Failed, Waiting
from chatd.store.webhooks import Webhooks as Table

AT_ONCE = 8  # calls on their way
CLAIM = 64  # events of one claim, each in its turn
LOOK = 2.0  # seconds between looks for what other nodes left, and for what is due again
COUNT = 15.0  # seconds between counts of what waits
RETRY_FIRST, RETRY_MOST = 1.0, 3600.0  # seconds between attempts, doubled each time, with jitter
REST_MOST = 30.0  # seconds without a call, while the backend takes nothing
GONE = 410  # the backend does not want this one, ever

log = structlog.get_logger()


class Webhooks:
    def __init__(self, settings: Settings, table: Table, fetch: Fetcher) -> None:
        self._settings, self._table, self._fetch = settings, table, fetch
        self._wake = trio.Event()
        self._places = trio.CapacityLimiter(AT_ONCE)
        self._failures = 0  # in a row
        self._counted_at = -COUNT
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
                claimed = await self._deliver_some()
                await self._count()
            except Unavailable:  # the writer says loudly enough that the database is gone
                claimed = 0
            await self._rest(claimed, stop)
        self.finished.set()

    async def _deliver_some(self) -> int:
        self._wake = trio.Event()
        most = CLAIM if not self._failures else 1  # one is enough to see whether the backend is back
        waiting = await self._table.claim(most, self._lease(most))
        done: list[int] = []
        failed: list[Failed] = []
        async with trio.open_nursery() as nursery:
            for one in waiting:
                nursery.start_soon(self._deliver, one, done, failed)
        if waiting:
            self._look_at(done, failed)
            await self._table.settle(done, failed)
        return len(waiting)

    def _lease(self, most: int) -> float:
        """Seconds in which this node is through with what it claims, however long each call takes."""
        return (most / AT_ONCE + 1) * self._settings.timeout + 10

    async def _deliver(self, one: Waiting, done: list[int], failed: list[Failed]) -> None:
        async with self._places:
            given = headers(self._settings.secret, one.event, one.body, **{"X-Chatd-Delivery": str(one.id)})
            try:
                answer = await self._fetch(
                    "POST", self._settings.url, within=self._settings.timeout, headers=given, content=one.body
                )
            except Unavailable as error:
                failed.append(self._failed(one, str(error)))
                return
        if 200 <= answer.status < 300:
            done.append(one.id)
            metrics.WEBHOOKS_SENT.labels(one.event).inc()
        else:
            failed.append(self._failed(one, f"HTTP {answer.status}", gone=answer.status == GONE))

    def _failed(self, one: Waiting, error: str, *, gone: bool = False) -> Failed:
        metrics.WEBHOOKS_FAILED.inc()
        if gone or one.attempts + 1 >= self._settings.attempts:
            log.error("webhook_given_up", id=one.id, of=one.event, attempts=one.attempts + 1, error=error)
            return Failed(one.id, error, None)
        delay = min(RETRY_FIRST * 2**one.attempts, RETRY_MOST)
        return Failed(one.id, error, delay * random.uniform(0.75, 1.25))

    def _look_at(self, done: Sequence[int], failed: Sequence[Failed]) -> None:
        """One line when the backend begins to fail, one when it is back."""
        if done:
            if self._failures:
                log.info("webhook_works_again")
            self._failures = 0
        elif failed:
            if not self._failures:
                log.warning("webhook_failed", error=failed[0].error, events=len(failed))
            self._failures += 1

    async def _rest(self, claimed: int, stop: trio.Event) -> None:
        if self._failures:
            with trio.move_on_after(min(0.5 * 2**self._failures, REST_MOST) * random.uniform(0.5, 1)):
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


async def _wait_for(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
