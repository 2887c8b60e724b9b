"""Cycles are found by the clock: the young ones soon, the old ones when enough connections have ended."""

from __future__ import annotations

import gc
import weakref

import trio
import trio.testing

from chatd import garbage


class Knot:
    def __init__(self) -> None:
        self.itself = self


async def test_young_cycles_go_soon_and_old_ones_seldom(autojump_clock: trio.testing.MockClock) -> None:
    ended = 0
    async with trio.open_nursery() as nursery:
        await nursery.start(garbage.collect, lambda: ended)
        assert not gc.isenabled()
        young, held = weakref.ref(Knot()), Knot()
        old = weakref.ref(held)
        await trio.sleep(2 * garbage.LATEST)
        assert young() is None
        del held
        await trio.sleep(10 * garbage.LATEST)
        assert old() is not None, "what has lived through one look is not looked at again"
        ended += garbage.ENDED_MOST
        await trio.sleep(2 * garbage.LATEST)
        assert old() is None
        nursery.cancel_scope.cancel()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


async def test_it_looks_sooner_where_a_look_takes_long(autojump_clock: trio.testing.MockClock) -> None:
    def looks() -> int:
        return int(gc.get_stats()[0]["collections"])

    async with trio.open_nursery() as nursery:
        await nursery.start(garbage.collect, lambda: 0)
        before = looks()
        await trio.sleep(10)
        quiet = looks() - before
        before = looks()
        for _ in range(200):
            many = [[n] for n in range(200_000)]  # tens of ms to look at, each time
            await trio.sleep(0.05)
        assert len(many) == 200_000
        assert looks() - before > 2 * quiet
        nursery.cancel_scope.cancel()
