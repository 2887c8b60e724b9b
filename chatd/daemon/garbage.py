"""Runs Python's garbage collector by the clock and mostly on young objects, so that its pauses are short.

Python itself collects when a thousand more objects were created than freed. 10,000 connections that replace
their few objects one for one reach that after minutes, and then 200,000 objects are scanned: a pause of 200 ms.
Nearly all objects are freed with their last reference anyway; requests in Quart leave reference cycles.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter

import structlog
import trio

PAUSE = 0.003  # seconds that a young collection should take: the time to the next one is adapted to this
SOONEST, LATEST = 0.01, 0.25  # bounds, in seconds, of the time between two young collections
# Objects that survive a young collection are collected once more, when most requests have been answered. Those
# that survive this too count as old: they are frozen, and young collections skip them.
SECOND_LATEST = 5.0  # seconds until this second collection, at most

# Old objects are collected after so many requests and connections have ended. With 10,000 connections that
# takes half a second, so the less a collection frees, the later the next one comes.
DONE_FIRST, DONE_LEAST = 20_000, 5_000
WORTH = 20_000  # blocks that make a collection worth its pause: about 2 MB
SELDOM = 6 * 3600.0  # seconds between two old collections, at most

log = structlog.get_logger()


async def collect(
    done: Callable[[], int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Collect until cancelled. `done` returns how many requests and connections have ended so far."""
    gc.disable()
    try:
        _everything()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_collect_young)
            nursery.start_soon(_collect_old, done, done())
            task_status.started()
    finally:
        gc.unfreeze()
        gc.enable()


async def _collect_young() -> None:
    period = LATEST
    spent, second = 0.0, trio.current_time()
    while True:
        await trio.sleep(period)
        took = _timed(partial(gc.collect, 0))
        period = min(LATEST, max(SOONEST, period * min(2.0, PAUSE / took)))
        spent += took
        # The second collection takes no longer than the first ones took together.
        if spent >= PAUSE or trio.current_time() - second >= SECOND_LATEST:
            await trio.lowlevel.checkpoint()
            gc.collect(1)
            gc.freeze()
            spent, second = 0.0, trio.current_time()


async def _collect_old(done: Callable[[], int], before: int) -> None:
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
    """Collect all objects, old and young. Returns how many blocks of memory that freed.

    The result of `gc.collect()` is too low: closing a generator frees the cycle that it is part of before
    Python counts. For a thousand such cycles it returns 0.
    """
    before = sys.getallocatedblocks()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return max(0, before - sys.getallocatedblocks())
