"""When Python looks for cycles: by the clock, among what is young, so that nobody waits long.

Python itself looks when a thousand objects more were made than went. Where 10,000 connections replace their
few objects one for one, that takes minutes, and then there are 200,000 to look at: 200 ms without service.
Nearly everything here goes with its last reference anyway; what Quart does for a request leaves cycles.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter

import structlog
import trio

PAUSE = 0.003  # seconds that one look shall take: the next comes sooner or later for it, between
SOONEST, LATEST = 0.01, 0.25  # seconds
# What is alive at a look gets a second one: most requests have been answered by then. Only what is alive then,
# too, counts as old and is not looked at any more.
SECOND_LATEST = 5.0  # seconds

# The old is looked at when so many requests and connections have come and gone. That takes half a second where
# there are 10,000 connections, so the more seldom the less it frees.
DONE_FIRST, DONE_LEAST = 20_000, 5_000
WORTH = 20_000  # blocks, some 2 MB
SELDOM = 6 * 3600.0  # seconds, however little is done

log = structlog.get_logger()


async def collect(
    done: Callable[[], int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """For ever. `done` tells how many requests and connections of any kind have come and gone so far."""
    gc.disable()
    try:
        _everything()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_look_at_the_young)
            nursery.start_soon(_look_at_the_old, done, done())
            task_status.started()
    finally:
        gc.unfreeze()
        gc.enable()


async def _look_at_the_young() -> None:
    period = LATEST
    spent, second = 0.0, trio.current_time()
    while True:
        await trio.sleep(period)
        took = _timed(partial(gc.collect, 0))
        period = min(LATEST, max(SOONEST, period * min(2.0, PAUSE / took)))
        spent += took
        # A second look takes no longer than the first ones together have taken.
        if spent >= PAUSE or trio.current_time() - second >= SECOND_LATEST:
            await trio.lowlevel.checkpoint()
            gc.collect(1)
            gc.freeze()
            spent, second = 0.0, trio.current_time()


async def _look_at_the_old(done: Callable[[], int], before: int) -> None:
    most, last = DONE_FIRST, trio.current_time()
    while True:
        await trio.sleep(LATEST)
        if done() - before >= most or trio.current_time() - last >= SELDOM:
            began = perf_counter()
            freed = _everything()
            log.info("garbage_collected", ms=round((perf_counter() - began) * 1e3), blocks=freed)
            most = max(DONE_LEAST, most // 2) if freed > 2 * WORTH else most * 2 if freed < WORTH else most
            before, last = done(), trio.current_time()


def _timed(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _everything() -> int:
    """How many blocks of memory this freed.

    `gc.collect()` returns less: a cycle through a generator goes when that is closed, before Python counts. For
    a thousand of them it returns 0.
    """
    before = sys.getallocatedblocks()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return max(0, before - sys.getallocatedblocks())
