"""Users who have left leave nothing behind: after thousands of them no structure of the daemon knows one.

No structure is named here. The test walks all objects that the daemon can reach, so that it also finds a new
structure that nobody tidies.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from chatd.chat import presence
from chatd.config import Config, Database, Limits, Rooms, Webhooks
from chatd.config.settings import Settings
from chatd.core.model import State
from chatd.daemon import assembly
from chatd.daemon.assembly import Parts
from chatd.hub.admission.registry import Handshake
from chatd.hub.session.session import Session
from chatd.store.database import Store, open_store
from chatd.store.read import batching
from chatd.store.write.commands import SetMember
from tests.test_audience import Ear

USERS = 2_000
GROUP = 10  # users who are members of one room, and come at the same time
AT_ONCE = 5  # groups
BEFORE = 7_310_000_000_000_000  # user ids begin after it, in a range that nothing else uses
ID = re.compile(r"73100000000\d{5}(?!\d)")
RETENTION = 3600.0  # seconds; much more than the daemon remembers of a user who has left
PATIENCE = 60.0  # seconds: the machine may be busy
# How many users a structure may still know, by a type on the way to it. A suspended task has its last one in a
# local variable. Debts to the database are looked at again when there are more than so many.
MAY_KNOW = {"coroutine": 1, "_Debts": batching.DEBTORS}


class Left(Exception):
    """The client has closed its connection."""


class Visitor(Ear):
    """A client that says its lines, and leaves."""

    def __init__(self, nursery: trio.Nursery, lines: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(nursery)
        self._lines, self._news = lines, trio.Event()
        self.closed = False

    def push(self, frames: bytes) -> None:
        super().push(frames)
        self._news.set()

    reply = push

    async def told(self, event: str, **fields: Any) -> dict[str, Any]:
        with trio.fail_after(PATIENCE):
            while True:
                while self.events:
                    found = self.events.pop(0)
                    if found["event"] == event and fields.items() <= found.items():
                        return found
                    assert found["event"] != "error", found
                self._news = trio.Event()
                await self._news.wait()

    def known(self) -> None: ...
    def our_turn(self) -> Any:
        return trio.CancelScope()

    def close_soon(self, *_: Any) -> None:
        self.closed = True

    close_for_good = close_soon

    async def next_message(self) -> str | bytes:
        if self.closed:
            raise Left
        try:
            return json.dumps(await anext(self._lines))
        except StopAsyncIteration:
            raise Left from None


async def all_of_it(made: list[Visitor], token: str, user_id: int) -> AsyncIterator[dict[str, Any]]:
    """What a user does in a visit. `made` gets the visitor after this has been called."""
    (line,) = made
    yield {"event": "auth", "token": token, "rooms": {str(user_id): None}, "ref": 1}
    await line.told("ready")
    yield {"event": "subscribe", "conversation_id": room_of(user_id), "presence": True, "ref": 2}
    await line.told("subscribed")
    if user_id % GROUP == 0:
        yield {"event": "typing", "conversation_id": user_id, "active": True, "ref": 3}
        yield {
            "event": "send",
            "conversation_id": user_id,
            "content": f"of {user_id}",
            "client_id": "c",
            "ref": 4,
        }
        message = (await line.told("message"))["id"]
        yield {"event": "read", "conversation_id": user_id, "id": message, "ref": 5}
        yield {"event": "react", "conversation_id": user_id, "id": message, "emoji": "👍", "on": True, "ref": 6}
        yield {"event": "history", "conversation_id": user_id, "ref": 7}
        await line.told("history")
    yield {"event": "unsubscribe", "conversation_id": room_of(user_id), "ref": 8}
    await line.told("ok", ref=8)


async def a_wrong_token(_made: list[Visitor]) -> AsyncIterator[dict[str, Any]]:
    yield {"event": "auth", "token": "wrong", "ref": 1}


def room_of(user_id: int) -> int:
    return 1 + (user_id - BEFORE) // GROUP


def address_of(user_id: int) -> str:
    number = user_id - BEFORE
    return f"10.73.{number // 256}.{number % 256}"


async def connect(parts: Parts, address: str, script: Any) -> Visitor:
    """One connection from the handshake to its end."""
    handshake = Handshake("/ws", {}, "chat.example", None, None, "", ())
    admission = parts.services.registry.admit(handshake, address)
    made: list[Visitor] = []
    try:
        async with trio.open_nursery() as nursery, aclosing(script(made)) as lines:
            made.append(Visitor(nursery, lines))
            try:
                await Session(parts.services, made[0], handshake, address).run()
            except Left:
                nursery.cancel_scope.cancel()
    finally:
        admission.give_back()
    return made[0]


async def visit(parts: Parts, user_id: int) -> None:
    assert (await connect(parts, address_of(user_id), a_wrong_token)).closed
    token = parts.chat.logins.authenticator.issue(user_id, 24 * 3600)  # type: ignore[attr-defined]
    script = partial(all_of_it, token=token, user_id=user_id)
    assert not (await connect(parts, address_of(user_id), script)).closed


async def churn(parts: Parts) -> None:
    async def some(groups: Iterator[int]) -> None:
        for first in groups:
            users = range(first, first + GROUP)
            members = [
                SetMember(conversation_id=room_of(one), user_id=one, state=State.ACTIVE) for one in users
            ]
            await parts.writer.submit(members).outcomes()
            async with trio.open_nursery() as nursery:
                for user_id in users:
                    nursery.start_soon(visit, parts, user_id)

    groups = iter(range(BEFORE + GROUP, BEFORE + GROUP + USERS, GROUP))
    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(some, groups)


# What the daemon can reach.


def roots(parts: Parts, tasks: Iterable[trio.lowlevel.Task]) -> Iterator[object]:
    yield parts
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "chatd":
            yield vars(module)
    for task in tasks:
        yield task.coro


def is_beyond(one: object) -> bool:
    """Whether it leads to what is not the daemon's: libraries, trio's other tasks, and with them this test."""
    if isinstance(one, type):
        return not one.__module__.startswith("chatd")
    return isinstance(one, ModuleType | FrameType | trio.lowlevel.Task | trio.Nursery | trio.CancelScope)


def left_behind(parts: Parts, tasks: Iterable[trio.lowlevel.Task]) -> dict[str, set[int]]:
    """The users of whom something tells that the daemon can reach, by the types on the way to it."""
    users = range(BEFORE + GROUP, BEFORE + GROUP + USERS)
    by_address = {address_of(user_id): user_id for user_id in users}

    def user_of(one: object) -> int | None:
        if type(one) is int:
            return one if one in users else None
        if isinstance(one, bytes | bytearray):
            one = one.decode("latin-1")
        if isinstance(one, str):
            found = ID.search(one)
            return int(found[0]) if found else by_address.get(one)
        return None

    others = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] != "chatd"]
    beyond = {id(vars(module)) for module in others}
    queue = deque(roots(parts, tasks))
    reached_from: dict[int, object] = {id(one): None for one in queue}
    found: dict[str, set[int]] = {}
    alive = []  # so that no id is used twice
    while queue:
        one = queue.popleft()
        alive.append(one)
        if (user_id := user_of(one)) is not None:
            found.setdefault(way_to(one, reached_from), set()).add(user_id)
        if is_beyond(one) or id(one) in beyond:
            continue
        for next in gc.get_referents(one):
            if id(next) not in reached_from:
                reached_from[id(next)] = one
                queue.append(next)
    return found


def way_to(one: object, reached_from: dict[int, object]) -> str:
    way = []
    while one is not None:
        way.append(type(one).__name__ + getattr(one, "__qualname__", ""))
        one = reached_from.get(id(one))
    return " > ".join(reversed(way))


def allowed(way: str) -> int:
    return max((most for name, most in MAY_KNOW.items() if name in way), default=0)


def parts_of(tmp_path: Path) -> tuple[Parts, Store]:
    config = Config(
        database=Database(url=f"sqlite:///{tmp_path}/x.db"),
        rooms=Rooms(access="open"),
        limits=Limits(handshakes_per_second=10**6),
        webhooks=Webhooks(url="http://127.0.0.1:1/", secret="s" * 32),
    )
    store = open_store(config.database)
    return assembly.assemble(Settings(config), store, "node"), store


async def test_what_is_kept_is_found_wherever_it_is(tmp_path: Path) -> None:
    user_id = BEFORE + USERS
    parts, store = parts_of(tmp_path)
    hub: Any = parts.hub
    with closing(store):
        assert left_behind(parts, []) == {}
        hub.planted = [
            {(presence.USERS, user_id): None},
            deque([b"%d" % user_id]),
            partial(print, address_of(user_id)),
        ]
        found = left_behind(parts, [])
    assert len(found) == 3
    assert all("Hub" in way and users == {user_id} for way, users in found.items())


@pytest.fixture
def few_lines() -> Iterator[None]:
    """The log has no line for each login."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("few_lines")
@pytest.mark.slow
async def test_nothing_is_kept_of_users_who_have_left(
    tmp_path: Path, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock_clock.rate = 1.0
    parts, store = parts_of(tmp_path)
    with closing(store):
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.writer.run)
            await nursery.start(parts.bus.run, parts.receiver)
            await nursery.start(parts.services.fanout.run)
            await nursery.start(parts.services.sweep.run)
            await nursery.start(parts.chat.presence.run)
            await nursery.start(parts.chat.typing.run)
            await nursery.start(parts.presence_webhooks.run, trio.Event())
            await churn(parts)
            mock_clock.jump(RETENTION)
            milliseconds = presence._milliseconds
            monkeypatch.setattr(presence, "_milliseconds", lambda: milliseconds() + int(RETENTION * 1000))
            for _ in range(6):  # rounds of all that tidies
                mock_clock.jump(60)
                await trio.sleep(0.5)
            found = left_behind(parts, nursery.child_tasks)
            nursery.cancel_scope.cancel()
    assert {way: len(users) for way, users in found.items() if len(users) > allowed(way)} == {}
