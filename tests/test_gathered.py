"""Reads for many, fairly: users take turns, and what takes long is waited for by who asked."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from chatd.store.read import batching
from chatd.store.read.batching import BATCH_WEIGHT, Batcher

Request = tuple[int, str, int]  # whose, what, and its weight
HEAVY = BATCH_WEIGHT + 1


class Database:
    """Reads in threads, as `Reader` does; those of the users in `held` last until they are let go."""

    def __init__(self) -> None:
        self.reads: list[list[Request]] = []
        self.held: dict[int, threading.Event] = {}
        self.begun = trio.Event()

    async def __call__(self, read: Callable[..., Any], requests: Sequence[Request]) -> Any:
        self.reads.append(list(requests))
        self.begun.set()
        return await trio.to_thread.run_sync(read, None, requests, abandon_on_cancel=True)

    def many(self, _: Any, requests: Sequence[Request]) -> list[str]:
        for user, _what, _weight in requests:
            if user in self.held:
                self.held[user].wait(10)
        return [f"{user} {what}" for user, what, _ in requests]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def ask(database: Database) -> Batcher[Request, str]:
    return Batcher(database, database.many, lambda one: one[2], lambda one: one[0])  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "GATHER", 0.0)


async def test_many_reads_of_one_user_hold_up_nobody(database: Database, ask: Batcher[Request, str]) -> None:
    """Twenty connections of one user ask for what takes long: one read of theirs is on its way, not all."""
    database.held[1] = threading.Event()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ask, (1, str(number), HEAVY))
        await database.begun.wait()
        with trio.fail_after(5):
            assert await ask((2, "x", 1)) == "2 x"
            assert await ask((3, "x", HEAVY)) == "3 x"
        assert sum(read[0][0] == 1 for read in database.reads) == 1
        database.held.pop(1).set()


async def test_equal_requests_of_one_user_are_read_once(database: Database, ask: Batcher[Request, str]) -> None:
    database.held[1] = threading.Event()
    answers: list[str] = []

    async def ask_for(what: str) -> None:
        answers.append(await ask((1, what, HEAVY)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_for, "first")
        await database.begun.wait()
        for _ in range(19):
            nursery.start_soon(ask_for, "same")
        await trio.testing.wait_all_tasks_blocked()
        database.held.pop(1).set()
    assert answers == ["1 first", *["1 same"] * 19]
    assert len(database.reads) == 2


async def test_who_has_had_much_waits_and_others_do_not(
    database: Database, ask: Batcher[Request, str], autojump_clock: trio.testing.MockClock
) -> None:
    """A user has a share of one reader in the long run; nobody else waits for the rest of it."""
    autojump_clock.autojump_threshold = math.inf

    async def long_read(*_: Any) -> Any:
        autojump_clock.jump(0.6)
        return ["long"]

    slow: Batcher[Request, str] = Batcher(long_read, database.many, lambda one: one[2], lambda one: one[0])  # type: ignore[arg-type]
    finished: list[tuple[int, float]] = []

    async def read(user: int) -> None:
        await slow((user, str(len(finished)), HEAVY))
        finished.append((user, trio.current_time()))

    await read(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 1)
        await trio.testing.wait_all_tasks_blocked()
        await read(2)
        assert [user for user, _ in finished] == [1, 2]
        autojump_clock.autojump_threshold = 0
    assert [user for user, _ in finished] == [1, 2, 1]
    begun = finished[2][1] - 0.6
    assert begun - finished[0][1] == pytest.approx((0.6 - batching.FREE) / batching.SHARE)


async def test_users_take_turns(database: Database, ask: Batcher[Request, str]) -> None:
    database.held[1] = threading.Event()
    database.held[2] = threading.Event()
    async with trio.open_nursery() as nursery:
        for user in (1, 2):  # both reads are on their way
            nursery.start_soon(ask, (user, "first", HEAVY))
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            nursery.start_soon(ask, (3, str(number), BATCH_WEIGHT // 2))
        nursery.start_soon(ask, (4, "x", BATCH_WEIGHT // 2))
        await trio.testing.wait_all_tasks_blocked()
        for event in list(database.held.values()):
            event.set()
    assert {one[0] for one in database.reads[2]} == {3, 4}


async def test_who_goes_away_takes_nobody_along(database: Database, ask: Batcher[Request, str]) -> None:
    """The task that reads is cancelled: another one of those who wait begins again."""
    database.held[1] = threading.Event()
    answers: list[str] = []

    async def ask_for(request: Request) -> None:
        answers.append(await ask(request))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as gone:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(ask_for, (1, "x", 1))
                await database.begun.wait()
                nursery.start_soon(ask_for, (1, "x", 1))
                nursery.start_soon(ask_for, (2, "x", 1))
                await trio.testing.wait_all_tasks_blocked()
                gone.cancel()
        database.held.pop(1).set()
    assert sorted(answers) == ["1 x", "2 x"]
