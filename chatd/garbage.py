"""When Python looks for cycles: by the clock, among what is young, so that nobody waits long.

Python itself looks when a thousand objects more were made than went. Where 10,000 connections replace their
few objects one for one, that takes minutes, and then there are 200,000 to look at: 200 ms without service.
Nearly everything here goes with its last reference anyway; HTTP connections and some requests leave cycles.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter

import structlog
import trio

PAUSE = 0.003  # seconds that one look shall take: the next comes sooner or later for it, between
SOONEST, LATEST = 0.01, 0.25  # seconds

# What has lived through one look is not looked at again, until so many connections have ended (one that was old
# leaves 2 kB, in wsproto's decoder), or so many seconds have passed. That takes half a second for 10,000.
ENDED_MOST, SELDOM = 20_000, 6 * 3600.0

log = structlog.get_logger()


async def collect(
    ended: Callable[[], int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """For ever. `ended` tells how many connections have ended so far."""
    gc.disable()
    try:
        _everything()
        task_status.started()
        await _by_the_clock(ended)
    finally:
        gc.unfreeze()
        gc.enable()


async def _by_the_clock(ended: Callable[[], int]) -> None:
    period, done, last = LATEST, ended(), trio.current_time()
    while True:
        await trio.sleep(period)
        took = _young()
        period = min(LATEST, max(SOONEST, period * min(2.0, PAUSE / took)))
        if ended() - done >= ENDED_MOST or trio.current_time() - last >= SELDOM:
            done, last = ended(), trio.current_time()
            log.info("garbage_collected", ms=round(_everything() * 1e3))


def _young() -> float:
    began = perf_counter()
    gc.collect(0)
    gc.freeze()
    return perf_counter() - began


def _everything() -> float:
    began = perf_counter()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return perf_counter() - began
