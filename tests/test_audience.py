"""Who is shown who is online: audiences that are right after any loss, and gone with those who asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from chatd.chat.presence import USERS
from chatd.config import Config, Database, Rooms
from chatd.config.settings import Settings
from chatd.core.errors import ChatError, Close, Final
from chatd.core.model import Identity, MemberChange, Position, State
from chatd.daemon import assembly
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.session.subscriptions import Subscriptions
from chatd.store.database import open_store
from chatd.store.write.commands import Create, SetMember

ROOM = 5
ADA, BOB, CYD, OUTSIDER = 21, 22, 23, 99


class Ear:
    """A line that remembers what it was given. `full`: it reads too slowly."""

    name = "ear"

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery, self.full = nursery, False
        self.events: list[dict[str, Any]] = []

    def push(self, frames: bytes) -> None:
        while frames:
            size, start = frames[1], 2
            if size >= 126:
                start = 4 if size == 126 else 10
                size = int.from_bytes(frames[2:start], "big")
            self.events.append(json.loads(frames[start : start + size]))
            frames = frames[start + size :]

    ended = False

    def try_push(self, frames: bytes) -> bool:
        return self.offer(frames)

    def offer(self, frames: bytes) -> bool:
        if not self.full:
            self.push(frames)
        return not self.full

    def unhurried(self) -> AbstractAsyncContextManager[None]:
        @asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            yield

        return turn()

    async def drained(self) -> None: ...

    def close_soon(self, code: Close, reason: str) -> None: ...
    def close_for_good(self, way: Final) -> None: ...
    def probe(self) -> None: ...
    def silent_for(self, now: float) -> float:
        return 0.0

    def answered(self) -> None: ...
    def close_at(self, deadline: float, code: Close, reason: str) -> None: ...
    async def next_message(self) -> str | bytes:
        raise NotImplementedError

    async def told(self, event: str, **fields: Any) -> dict[str, Any]:
        """The next event of this name with these fields; those before it are gone."""
        with trio.fail_after(3):
            while True:
                while self.events:
                    found = self.events.pop(0)
                    if found["event"] == event and fields.items() <= found.items():
                        return found
                await trio.sleep(0.005)


class Node:
    """The parts of a daemon without its ports, and the database past them."""

    def __init__(self, parts: assembly.Parts, nursery: trio.Nursery) -> None:
        self.parts, self.nursery = parts, nursery
        self.presence, self.audiences = parts.chat.presence, parts.services.audiences
        self.sweep = parts.services.sweep

    def client(self, user_id: int) -> tuple[Subscriptions, Ear]:
        ear = Ear(self.nursery)
        one = Subscriptions(self.parts.services, ear, flat=False)
        one.become(Identity(user_id, 2**40, 0, frozenset()))
        return one, ear

    async def watching(self, user_id: int) -> tuple[Subscriptions, Ear]:
        one, ear = self.client(user_id)
        await one.enter(one.join(ROOM, presence=True), Position(), None, 1)
        return one, ear

    async def set_member(self, user_id: int, state: State) -> None:
        command = SetMember(conversation_id=ROOM, user_id=user_id, state=state)
        await self.parts.writer.submit([command]).outcome()

    @property
    def kept(self) -> tuple[int, int]:
        return len(self.audiences._audiences), len(self.audiences._rooms_of)


@pytest.fixture
async def node(tmp_path: Path, nursery: trio.Nursery) -> Any:
    config = Config(database=Database(url=f"sqlite:///{tmp_path}/x.db"), rooms=Rooms(access="members"))
    store = open_store(config.database)
    parts = assembly.assemble(Settings(config), store, "node")
    await nursery.start(parts.writer.run)
    await nursery.start(parts.bus.run, parts.receiver)
    await nursery.start(parts.services.fanout.run)
    await nursery.start(parts.services.sweep.run)
    one = Node(parts, nursery)
    for user_id in (ADA, BOB, CYD):
        await one.set_member(user_id, State.ACTIVE)
    yield one
    store.close()


@pytest.fixture
def deaf(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal about members comes any more, as while Redis is away."""
    monkeypatch.setattr(node.parts.bus, "_receiver", Deaf(node.parts.bus._receiver))  # type: ignore[attr-defined]


class Deaf:
    def __init__(self, receiver: Any) -> None:
        self._receiver = receiver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._receiver, name)

    def signal(self, signal: Any) -> None:
        if not isinstance(signal, MemberChange):
            self._receiver.signal(signal)


@pytest.mark.parametrize("user_id", [OUTSIDER, ADA])
async def test_subscribe_and_unsubscribe_in_one_packet_leaves_nothing(node: Node, user_id: int) -> None:
    one, _ = node.client(user_id)
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(enter_in_vain, one, one.join(ROOM, presence=True))
            if number % 2:
                await trio.lowlevel.checkpoint()
            one.leave(ROOM)
    assert node.kept == (0, 0)
    assert not node.presence.present(ROOM)


async def enter_in_vain(one: Subscriptions, subscription: Subscription) -> None:
    with pytest.raises(ChatError):
        await one.enter(subscription, Position(), None, 1)


async def test_who_may_not_look_loads_no_audience(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: Any) -> Any:
        raise AssertionError("the members were read")

    monkeypatch.setattr(node.parts.chat.conversations, "member_ids", refused)
    one, _ = node.client(OUTSIDER)
    await enter_in_vain(one, one.join(ROOM, presence=True))


async def test_the_last_who_asked_takes_the_audience_along(node: Node) -> None:
    """Also where others stay in the room, and where it was the wish that ended."""
    ada, _ = await node.watching(ADA)
    bob, ear = await node.watching(BOB)
    assert node.kept == (1, 3)
    ada.leave(ROOM)
    assert node.kept == (1, 3)
    await bob.enter(bob.join(ROOM, presence=False), Position(), None, 2)
    assert "online" not in await ear.told("subscribed", ref=2)
    assert node.kept == (0, 0)


async def test_a_message_that_overtakes_a_lost_member_signal_leaves_no_wrong_picture(
    node: Node, deaf: None
) -> None:
    _, ear = await node.watching(ADA)
    node.presence.arrive(USERS, BOB)
    assert (await ear.told("presence", user_id=BOB))["online"] is True
    await node.set_member(BOB, State.REMOVED)
    await node.parts.writer.submit([Create(conversation_id=ROOM, user_id=CYD, content="hello")]).outcome()
    await ear.told("message")  # so the node has held who is there against the database
    await node.sweep.once()
    assert (await ear.told("subscribed"))["online"] == []
    node.presence.leave(USERS, BOB)
    node.presence.arrive(USERS, CYD)
    await ear.told("presence", user_id=CYD)
    await node.sweep.once()
    assert ear.events == []


async def test_a_lost_signal_before_one_that_came_is_missed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ear = await node.watching(ADA)
    node.presence.arrive(USERS, BOB)
    node.presence.arrive(USERS, CYD)
    await ear.told("presence", user_id=CYD)
    with monkeypatch.context() as patch:
        patch.setattr(node.parts.bus, "_receiver", Deaf(node.parts.bus._receiver))  # type: ignore[attr-defined]
        await node.set_member(BOB, State.REMOVED)
    await node.set_member(CYD, State.REMOVED)
    await ear.told("member", user_id=CYD)
    await node.sweep.once()
    assert (await ear.told("subscribed"))["online"] == []


async def test_who_read_too_slowly_gets_the_whole_picture_after(node: Node) -> None:
    _, slow = await node.watching(ADA)
    _, fast = await node.watching(CYD)
    slow.full = True
    node.presence.arrive(USERS, BOB)
    await fast.told("presence", user_id=BOB)
    slow.full = False
    slow.events.clear()
    await node.sweep.once()
    assert (await slow.told("subscribed"))["online"] == [BOB]
    assert fast.events == []


async def test_what_an_overrun_queue_left_out_is_told_after(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ear = await node.watching(ADA)
    with monkeypatch.context() as patch:
        patch.setattr("chatd.hub.fanout.queue.QUEUE_BYTES", 10)
        node.presence.arrive(USERS, BOB)
    ear.events.clear()
    await node.sweep.once()
    assert (await ear.told("subscribed"))["online"] == [BOB]


async def test_a_database_that_went_back_is_believed_after_a_second_look(node: Node) -> None:
    _, ear = await node.watching(ADA)
    node.audiences._audiences[ROOM].version += 1  # type: ignore[operator]
    ear.events.clear()
    await node.sweep.once()  # what was read a moment ago may just be old
    assert ear.events == []
    await node.sweep.once()
    await ear.told("subscribed")
