"""Cycles are found by the clock: the young ones soon, the old when enough was done; connections make none."""

from __future__ import annotations

import gc
import socket
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import h11
import pytest
import trio
import trio.testing
from wsproto.frame_protocol import FrameProtocol

from chatd.api.connection import Connection
from chatd.config import Config, Database
from chatd.config.settings import Settings
from chatd.daemon import garbage, lifecycle
from chatd.store.database import open_store
from tests.faults.line import Line
from tests.test_http import GET, everything, served


class Knot:
    def __init__(self) -> None:
        self.itself = self


def knotted_generator() -> None:
    """What wsproto's parser is: an object whose generator holds it."""

    def generate(knot: Knot) -> Iterator[Knot]:
        while True:
            yield knot

    knot = Knot()
    knot.itself = generate(knot)  # type: ignore[assignment]
    next(knot.itself)  # type: ignore[call-overload]


async def test_young_cycles_go_soon_and_old_ones_when_enough_was_done(
    autojump_clock: trio.testing.MockClock,
) -> None:
    done = 0
    async with trio.open_nursery() as nursery:
        await nursery.start(garbage.collect, lambda: done)
        assert not gc.isenabled()
        young, held = weakref.ref(Knot()), Knot()
        old = weakref.ref(held)
        await trio.sleep(2 * garbage.LATEST)
        assert young() is None
        await trio.sleep(2 * garbage.SECOND_LATEST)
        del held
        await trio.sleep(2 * garbage.SECOND_LATEST)
        assert old() is not None, "what has lived through two looks is not looked at again"
        done += garbage.DONE_FIRST
        await trio.sleep(2 * garbage.LATEST)
        assert old() is None
        nursery.cancel_scope.cancel()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


async def test_what_is_alive_at_one_look_gets_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """As a request that was in progress just then."""
    async with trio.open_nursery() as nursery:
        await nursery.start(garbage.collect, lambda: 0)
        held = Knot()
        soon = weakref.ref(held)
        await trio.sleep(1.5 * garbage.LATEST)
        del held
        await trio.sleep(1.5 * garbage.SECOND_LATEST)
        assert soon() is None
        nursery.cancel_scope.cancel()


async def test_where_nothing_is_found_it_is_looked_for_less_often(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, looks, done = 0, 0, 0

    def everything() -> int:
        nonlocal looks
        looks += 1
        return found

    async def looks_in(rounds: int) -> int:
        nonlocal done
        before = looks
        for _ in range(rounds):
            done += garbage.DONE_FIRST
            await trio.sleep(2 * garbage.LATEST)
        return looks - before

    monkeypatch.setattr(garbage, "_everything", everything)
    async with trio.open_nursery() as nursery:
        await nursery.start(garbage.collect, lambda: done)
        assert await looks_in(31) == 5, "after 1, 2, 4, 8 and 16"
        found = 10 * garbage.WORTH
        assert await looks_in(32 + 16 + 8 + 4 + 2 + 1) == 6
        assert await looks_in(10) == 10
        nursery.cancel_scope.cancel()


@pytest.fixture
def leftovers() -> Iterator[list[object]]:
    """What only the collector can free, once it has been called."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize(
    "words",
    [
        GET,
        GET * 3,
        b"",
        b"no HTTP\r\n\r\n",
        GET[:10],
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12",
    ],
)
async def test_an_http_connection_leaves_nothing_behind(words: bytes, leftovers: list[object]) -> None:
    async with served() as (peer, _, _):
        peer.sendall(words)
        peer.shutdown(socket.SHUT_WR)
        await everything(peer)
        await trio.testing.wait_all_tasks_blocked(0.01)
        gc.collect()
        kinds = (Connection, h11.Connection, trio.SocketStream)
        assert [one for one in leftovers if isinstance(one, kinds)] == []


def test_a_look_counts_cycles_through_generators() -> None:
    gc.disable()
    try:
        garbage._everything()
        for _ in range(1000):
            knotted_generator()
        assert garbage._everything() > 3000
    finally:
        gc.unfreeze()
        gc.enable()


async def test_a_websocket_that_has_ended_leaves_nothing_behind(
    tmp_path: Path, nursery: trio.Nursery, leftovers: list[object]
) -> None:
    config = Config(database=Database(url=f"sqlite:///{tmp_path}/x.db"))
    with closing(open_store(config.database)) as store:
        hub = lifecycle.assemble(Settings(config), store, "node").hub
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(hub.serve, [listener], 10)
        line = await Line.open(listener.socket.getsockname()[1], "127.0.0.1")  # reads frames without wsproto
        await line.receive()
        line.close()
        with trio.fail_after(5):
            while not hub.ended:
                await trio.sleep(0.01)
        # Not among the leftovers: a collector that closes the parser's generator frees the parser by that.
        assert [one for one in gc.get_objects() if isinstance(one, FrameProtocol)] == []
        nursery.cancel_scope.cancel()


@pytest.mark.slow
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
