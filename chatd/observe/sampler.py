"""Samples the daemon's state: updates gauges, measures the event loop's lag, keeps the last
minutes for /status.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable

import trio
from msgspec import Struct

from chatd.core.errors import Unavailable
from chatd.observe import metrics

LAG_PERIOD = 0.1  # seconds between two measurements of the loop's lag
PERIOD = 2.0  # seconds between two points of the curves
POINTS = 150  # points to keep: five minutes
BACKLOG_PERIOD = 10.0  # seconds between two reads of the outbox's size


class Point(Struct, frozen=True):
    """One point of the curves.

    Rates are per second. Lags are in seconds: 99th percentiles since the last point.
    """

    at: float  # unix seconds
    connections: float
    users: float
    rooms: float
    posted: float
    delivered: float
    opened: float
    loop_lag: float
    delivery_lag: float
    database: float
    memory: float  # bytes
    redis: bool


class Counts(Struct, frozen=True):
    """Present numbers of this process."""

    rooms: int
    subscriptions: int
    users: int
    reads: int  # reads of the database that are running


# Returns (groups in the outbox, age of the oldest in seconds). Raises Unavailable.
Backlog = Callable[[], Awaitable[tuple[int, float]]]


class Sampler:
    def __init__(self, counts: Callable[[], Counts], backlog: Backlog | None) -> None:
        """`backlog` is None without Redis."""
        self._counts, self._backlog = counts, backlog
        self.points: deque[Point] = deque(maxlen=POINTS)
        self._before: dict[str, float] = {}
        self._then = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_measure_lag)
            nursery.start_soon(self._draw)
            if self._backlog is not None:
                nursery.start_soon(_watch_outbox, self._backlog)
            task_status.started()

    async def _draw(self) -> None:
        while True:
            self._gauge()
            samples = await trio.to_thread.run_sync(metrics.samples)
            now = trio.current_time()
            if self._before:
                self.points.append(_point(samples, self._before, now - self._then))
            self._before, self._then = samples, now
            await trio.sleep(PERIOD)

    def _gauge(self) -> None:
        counts = self._counts()
        metrics.ROOMS.set(counts.rooms)
        metrics.SUBSCRIPTIONS.set(counts.subscriptions)
        metrics.USERS.set(counts.users)
        metrics.DB_POOL.set(counts.reads)
        metrics.BLOCKS.set(sys.getallocatedblocks())


async def _watch_outbox(backlog: Backlog) -> None:
    while True:
        try:
            pending, oldest = await backlog()
            metrics.OUTBOX_PENDING.set(pending)
            metrics.OUTBOX_OLDEST.set(oldest)
        except Unavailable:
            pass  # the writer logs it, and /readyz shows it
        await trio.sleep(BACKLOG_PERIOD)


async def _measure_lag() -> None:
    while True:
        due = trio.current_time() + LAG_PERIOD
        await trio.sleep_until(due)
        metrics.LOOP_LAG.observe(trio.current_time() - due)


def _point(now: dict[str, float], before: dict[str, float], seconds: float) -> Point:
    def rate(name: str) -> float:
        return max(0.0, now.get(name, 0.0) - before.get(name, 0.0)) / seconds

    return Point(
        at=time.time(),
        connections=now.get("chatd_connections", 0.0),
        users=now.get("chatd_users", 0.0),
        rooms=now.get("chatd_rooms", 0.0),
        posted=rate("chatd_messages_posted_total"),
        delivered=rate("chatd_messages_delivered_total"),
        opened=rate("chatd_connections_opened_total"),
        loop_lag=percentile("chatd_eventloop_lag_seconds", now, before),
        delivery_lag=percentile("chatd_delivery_lag_seconds", now, before),
        database=percentile("chatd_db_duration_seconds", now, before),
        memory=now.get("process_resident_memory_bytes", 0.0),
        redis=bool(now.get("chatd_redis_up", 1.0)),
    )


def percentile(name: str, now: dict[str, float], before: dict[str, float], share: float = 0.99) -> float:
    """A percentile of what a histogram has counted between two calls of `samples`; 0.0 if it
    has counted nothing.

    The result is the upper bound of the percentile's bucket, or the highest finite bound.
    """
    prefix = f"{name}_bucket{{"
    grown = sorted(
        (float(key[len(prefix) : -1]), value - before.get(key, 0.0))
        for key, value in now.items()
        if key.startswith(prefix)
    )
    total = grown[-1][1] if grown else 0.0
    if total <= 0:
        return 0.0
    bounds = [bound for bound, count in grown if count >= share * total]
    return bounds[0] if bounds[0] < float("inf") else grown[-2][0]
