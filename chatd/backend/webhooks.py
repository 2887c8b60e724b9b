"""Delivers events to the backend's webhook at least once, with retries.

A table is the queue, so a restart loses nothing, and several nodes can deliver in parallel, each the events
that it has claimed. Two lanes share the work: one for events that were never tried, one for events that failed
before. So no event waits behind the failures of others. A backend that is down is called less and less often.
"""

from __future__ import annotations

from collections import deque

import structlog
import trio
from msgspec import Struct

from chatd.backend.fetch import Fetcher
from chatd.config import Webhooks
from chatd.core import backoff, callbacks
from chatd.core.errors import CallFailed, Unavailable
from chatd.observe import metrics
from chatd.observe.logs import Recurring
from chatd.store.queues.webhooks import Failed, Waiting, WebhookQueue

AT_ONCE = 8  # calls that a lane makes at the same time
CLAIM = 64  # events in one claim
WORK = 5.0  # seconds after which a lane starts no more calls of a claim; keeps the lease of a killed node short
SETTLE = 5.0  # seconds of the lease for recording the results in the database
LOOK = 2.0  # seconds between two checks for events left by other nodes, and for retries that are due
COUNT = 15.0  # seconds between two counts of the waiting events
RETRY_FIRST, RETRY_MOST = 1.0, 3600.0  # seconds between the attempts of an event, doubled each time
JITTER = (0.75, 1.25)  # random factor of that time
# A lane pauses after `FAILURES` failures at its start, or `RECENT` failures in a row after a success.
FAILURES = 5
RECENT = 20
REST_FIRST, REST_MOST = 1.0, 30.0  # seconds of a pause, doubled each time, with jitter
REST_REFUSED = 1.0  # longest pause of the lane for new events if the backend answers, because it is not down
QUIET = 60.0  # seconds between two log lines about the same problem
GONE = 410  # with this status the backend says that it will never take this event
AWAY = frozenset([429, 502, 503, 504])  # statuses of a backend that is down or overloaded

log = structlog.get_logger()


class Problem(Struct, frozen=True):
    """Why a delivery failed. `answered`: the backend is up and refused the event. `final`: do not retry."""

    error: str
    answered: bool = False
    final: bool = False


class Health:
    """Decides from the last results of a lane whether the backend accepts any events at all."""

    def __init__(self) -> None:
        self._recent: deque[Problem | None] = deque(maxlen=RECENT)
        self._rests = 0  # pauses in a row

    def note(self, problem: Problem | None) -> None:
        self._recent.append(problem)
        if problem is None:
            self._rests = 0

    @property
    def failing(self) -> bool:
        return len(self._recent) >= FAILURES and None not in self._recent

    def rest(self, most_if_answered: float) -> float:
        """Seconds of the next pause; at most `most_if_answered` if the backend answered all recent calls."""
        answered = all(problem is not None and problem.answered for problem in self._recent)
        seconds = backoff.delay(self._rests, REST_FIRST, most_if_answered if answered else REST_MOST)
        self._rests += 1
        return seconds


class WebhookDelivery:
    def __init__(self, settings: Webhooks, table: WebhookQueue, fetch: Fetcher) -> None:
        self._settings, self._table, self._fetch = settings, table, fetch
        self._lanes = [Lane(self, again=False), Lane(self, again=True)]
        self._logged_failing = False  # whether the log has said that deliveries fail
        self._failed = Recurring("webhook_failed", every=QUIET)
        self._given_up = Recurring("webhook_given_up", every=QUIET)
        self._count_now = trio.Event()
        self.table, self.timeout = table, settings.timeout
        self.full = False  # so many events wait that no more about presence may be added
        self.finished = trio.Event()

    def wake(self) -> None:
        """New events were committed: deliver them now."""
        self._lanes[0].wake()

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Deliver events until `stop`, and then finish the calls that have started."""
        task_status.started(self.finished)
        async with trio.open_nursery() as counting:
            counting.start_soon(self._count_for_ever)
            async with trio.open_nursery() as nursery:
                for lane in self._lanes:
                    nursery.start_soon(lane.run, stop)
            counting.cancel_scope.cancel()
        self.finished.set()

    async def deliver(self, one: Waiting) -> Problem | None:
        id, delivery = callbacks.id_of(one.id, one.body), {"X-Chatd-Delivery": str(one.id)}
        given = callbacks.headers(self._settings.secret, one.event, id, one.body, **delivery)
        url, within = self._settings.url, self._settings.timeout
        try:
            answer = await self._fetch("POST", url, within=within, headers=given, content=one.body, whole=False)
        except CallFailed as error:
            return Problem(error.reason)
        if 200 <= answer.status < 300:
            return None
        return Problem(f"HTTP {answer.status}", answered=answer.status not in AWAY, final=answer.status == GONE)

    def succeed(self, one: Waiting) -> None:
        metrics.WEBHOOKS_SENT.labels(one.event).inc()
        if self._logged_failing:
            self._logged_failing = False
            log.info("webhook_works_again")

    def fail(self, one: Waiting, problem: Problem) -> Failed:
        metrics.WEBHOOKS_FAILED.inc()
        self._logged_failing = self._logged_failing or self._failed.warn(error=problem.error)
        if not problem.final and one.attempts + 1 < self._settings.attempts:
            return Failed(one.id, problem.error, backoff.delay(one.attempts, RETRY_FIRST, RETRY_MOST, JITTER))
        self._given_up.error(id=one.id, of=one.event, attempts=one.attempts + 1, error=problem.error)
        return Failed(one.id, problem.error, None)

    def count_soon(self) -> None:
        """Update the metrics now, because events were given up."""
        self._count_now.set()

    async def _count_for_ever(self) -> None:
        while True:
            self._count_now = trio.Event()
            try:
                waiting, dead = await self._table.counts()
            except Unavailable:
                pass  # the writer reports that the database is gone
            else:
                metrics.WEBHOOKS_WAITING.set(waiting)
                metrics.WEBHOOKS_DEAD.set(dead)
                self.full = waiting > self._settings.kept
            with trio.move_on_after(COUNT):
                await self._count_now.wait()


class Lane:
    """Claims and delivers events of one kind: with `again` those that failed before, else those never tried."""

    def __init__(self, webhooks: WebhookDelivery, *, again: bool) -> None:
        self._webhooks, self._again = webhooks, again
        self._health = Health()
        # Results of the last claim that are not recorded yet.
        self._unsettled: tuple[list[int], list[Failed], list[int]] | None = None
        self._wake = trio.Event()

    def wake(self) -> None:
        self._wake.set()

    async def run(self, stop: trio.Event) -> None:
        while not stop.is_set():
            try:
                claimed = await self._deliver_some(stop)
            except Unavailable:  # the writer reports that the database is gone
                claimed = 0
            await self._rest(claimed, stop)

    async def _deliver_some(self, stop: trio.Event) -> int:
        self._wake = trio.Event()
        await self._settle()
        left = deque(await self._claim())
        claimed = len(left)
        until = trio.current_time() + WORK
        done: list[int] = []
        failed: list[Failed] = []
        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_ONCE, claimed)):
                nursery.start_soon(self._deliver_each, left, done, failed, until, stop)
        if claimed:
            self._unsettled = done, failed, [one.id for one in left]
            await self._settle()
        return claimed

    async def _settle(self) -> None:
        """Record the results of the last claim, also those that an outage of the database has delayed.

        This comes before the next claim: after the lease, events without a recorded result are delivered again.
        """
        if self._unsettled is not None:
            _, failed, _ = self._unsettled
            await self._webhooks.table.settle(*self._unsettled)
            self._unsettled = None
            if any(one.again_in is None for one in failed):
                self._webhooks.count_soon()

    async def _claim(self) -> list[Waiting]:
        table, lease = self._webhooks.table, WORK + self._webhooks.timeout + SETTLE
        if self._health.failing:
            return await table.claim_some(lease, again=self._again)
        return await table.claim(CLAIM, lease, again=self._again)

    async def _deliver_each(
        self, left: deque[Waiting], done: list[int], failed: list[Failed], until: float, stop: trio.Event
    ) -> None:
        """Deliver events from `left` until none is left, the time is over, `stop` is set, or the backend fails.

        Events that stay in `left` go back to the queue untried.
        """
        while left:
            one = left.popleft()
            problem = await self._webhooks.deliver(one)
            self._health.note(problem)
            if problem is None:
                self._webhooks.succeed(one)
                done.append(one.id)
            else:
                failed.append(self._webhooks.fail(one, problem))
            if stop.is_set() or self._health.failing or trio.current_time() > until:
                return

    async def _rest(self, claimed: int, stop: trio.Event) -> None:
        if claimed and self._health.failing:
            with trio.move_on_after(self._health.rest(REST_MOST if self._again else REST_REFUSED)):
                await stop.wait()
        elif not claimed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_for, self._wake, nursery.cancel_scope)
                nursery.start_soon(_wait_for, stop, nursery.cancel_scope)
                nursery.cancel_scope.deadline = trio.current_time() + LOOK


async def _wait_for(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
