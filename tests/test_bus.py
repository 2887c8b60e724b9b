"""The bus over a real Redis, while the database behind it is away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import trio

from chatd.bus.redis import RedisBus
from chatd.config import Redis
from chatd.core.errors import Unavailable
from chatd.core.model import Present, Signal
from tests.services import RedisServer


class Outbox:
    """Of a database that is `away`, or so frozen that nobody answers."""

    def __init__(self, *, frozen: bool) -> None:
        self._frozen = frozen
        self.asked = 0

    async def relay(self, publish: Callable[..., None], *, node: str, above: int = 0) -> tuple[int, int]:
        self.asked += 1
        if self._frozen:
            await trio.sleep_forever()
        raise Unavailable

    async def expire(self) -> int:
        raise Unavailable

    def settle(self, ids: Iterable[int]) -> None: ...


class Ear:
    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self.up = False

    def signal(self, signal: Signal) -> None:
        self.signals.append(signal)

    def links(self, up: bool) -> None:
        self.up = up

    def changes(self, changes: Sequence[Any], committed_at: float | None = None) -> None: ...
    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None: ...
    def lost(self) -> None: ...


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.parametrize("frozen", [False, True])
async def test_signals_pass_while_the_database_is_away(own_redis: RedisServer, frozen: bool) -> None:
    """Redis is there, and who comes and goes needs no database: nobody is taken for gone."""
    config, outbox = Redis(url=own_redis.url), Outbox(frozen=frozen)
    ears = {name: Ear() for name in ("one", "other")}
    buses = [RedisBus(config, node=name, outbox=outbox) for name in ears]
    async with trio.open_nursery() as nursery:
        for bus, ear in zip(buses, ears.values(), strict=True):
            await nursery.start(bus.run, ear)
        await until(lambda: outbox.asked >= 2 and all(ear.up for ear in ears.values()))
        for number in range(3):
            buses[0].tell(Present("one", [(0, 7, 1, number)], None))
            await until(lambda: len(ears["other"].signals) > number)  # noqa: B023
        assert all(isinstance(signal, Present) for signal in ears["other"].signals)
        nursery.cancel_scope.cancel()
