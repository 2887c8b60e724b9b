"""The bus over a real Redis: while the database behind it is away, and when Redis falls silent."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from chatd.bus.pubsub import PATIENCE, PING_AFTER
from chatd.bus.redis import RedisBus
from chatd.config import Redis
from chatd.core.errors import Unavailable
from chatd.core.model import Present, Signal
from tests.services import RedisServer


class Outbox:
    """Of a database that is away, or so frozen that nobody answers."""

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


class EmptyOutbox(Outbox):
    """Of a database that is well."""

    def __init__(self) -> None:
        super().__init__(frozen=False)

    async def relay(self, publish: Callable[..., None], *, node: str, above: int = 0) -> tuple[int, int]:
        await trio.lowlevel.checkpoint()
        return 0, above


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


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    with trio.fail_after(seconds):
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


NOTICED = 15.0  # seconds at most until a dead link is known as one


async def expect_links(bus: RedisBus, up: bool, seconds: float) -> None:
    await until(lambda: all(state is up for state in bus._links.values()), seconds)


async def test_a_frozen_redis_is_noticed_on_each_link(own_redis: RedisServer) -> None:
    """Its connections stay open, and its kernel acknowledges what is sent."""
    bus = RedisBus(Redis(url=own_redis.url), node="n", outbox=EmptyOutbox())
    async with trio.open_nursery() as nursery:
        await nursery.start(bus.run, Ear())
        await expect_links(bus, True, 10)
        own_redis.pause()
        try:
            await expect_links(bus, False, NOTICED)
        finally:
            own_redis.resume()
        await expect_links(bus, True, 10)
        nursery.cancel_scope.cancel()


async def test_a_subscription_that_nobody_uses_stays_up(own_redis: RedisServer) -> None:
    bus = RedisBus(Redis(url=own_redis.url), node="n", outbox=EmptyOutbox())
    async with trio.open_nursery() as nursery:
        await nursery.start(bus.run, Ear())
        await expect_links(bus, True, 10)
        with structlog.testing.capture_logs() as lines:
            await trio.sleep(PING_AFTER + PATIENCE + 2)
        assert lines == [] and bus.up
        nursery.cancel_scope.cancel()


class Distant:
    """A Redis in a network of its own, whose cable can be pulled."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._name = directory, f"chatd{os.getpid()}"
        self._network = f"10.231.{random.randrange(256)}"
        self.url = f"redis://{self._network}.2:6379/0"

    def __enter__(self) -> Distant:
        name = self._name
        self._run("ip", "netns", "add", name)
        self._run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._run("ip", "address", "add", f"{self._network}.1/30", "dev", name)
        self._run("ip", "link", "set", name, "up")
        self._inside("ip", "address", "add", f"{self._network}.2/30", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")
        options = ["--bind", f"{self._network}.2", "--save", "", "--dir", str(self._directory)]
        command = ["ip", "netns", "exec", name, "redis-server", *options, "--protected-mode", "no"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait()
        self._run("ip", "link", "delete", self._name)
        self._run("ip", "netns", "delete", self._name)

    def pull_the_cable(self) -> None:
        self._inside("ip", "link", "set", "eth0", "down")

    def _inside(self, *command: str) -> None:
        self._run("ip", "netns", "exec", self._name, *command)

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


def may_make_networks() -> bool:
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and made.returncode == 0 and shutil.which("ip") is not None


@pytest.mark.service
@pytest.mark.skipif(not may_make_networks(), reason="wants root, to make a network of its own")
async def test_a_redis_behind_a_dead_cable_is_noticed_on_each_link(tmp_path: Path) -> None:
    """Nobody answers any more, not even a kernel."""
    with Distant(tmp_path) as server:
        bus = RedisBus(Redis(url=server.url), node="n", outbox=EmptyOutbox())
        async with trio.open_nursery() as nursery:
            await nursery.start(bus.run, Ear())
            await expect_links(bus, True, 30)
            server.pull_the_cable()
            await expect_links(bus, False, NOTICED)
            nursery.cancel_scope.cancel()
