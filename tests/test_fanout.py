"""The fanout against a real store: what the bus loses, doubles or does not tell is made up for in place."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from msgspec import UNSET
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

from chatd.chat.conversations import Conversations
from chatd.chat.presence import Presence
from chatd.config import Api, Config, Database
from chatd.config.settings import Settings
from chatd.core.errors import ChatError, NotFound, Unavailable
from chatd.core.model import Change, Group, Identity, Kind, MemberChange, Position, State
from chatd.core.protocol import text_frame
from chatd.hub.fanout import sweep
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.queue import Announcement, FanoutQueue
from chatd.hub.fanout.rooms import AHEAD_CHANGES, Membership, Room, Rooms
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.fanout.sweep import Sweep
from chatd.hub.session.subscriptions import Subscriptions
from chatd.observe import metrics
from chatd.store.database import Store, open_store
from chatd.store.read import lookups
from chatd.store.write.commands import Create, SetMember
from chatd.store.write.writer import Writer


class Ear:
    """A listener whose payloads are told apart by seq."""

    user_id, flat = 1, False

    def __init__(self) -> None:
        self.heard = bytearray()
        self.resynced: list[Subscription] = []

    def push(self, frames: bytes) -> None:
        self.heard += frames

    def try_push(self, frames: bytes) -> bool:
        self.heard += frames
        return True

    def offer(self, frames: bytes) -> bool:
        self.heard += frames
        return True

    def resync(self, subscription: Subscription) -> None:
        subscription.hold()
        self.resynced.append(subscription)

    def fall_behind(self, subscription: Subscription) -> None:
        raise AssertionError("there is room for everything")

    def dropped(self, subscription: Subscription) -> None:
        raise AssertionError("nobody was removed")


async def nobody_asks(room: Room, version: int) -> None:
    pass


class Repairs:
    """A fanout with one live subscription, and the changes that were committed but not told."""

    def __init__(self, store: Store, writer: Writer, ear: Ear, groups: list[Group]) -> None:
        self.store, self._writer, self.ear, self._groups = store, writer, ear, groups
        self.rooms = Rooms()
        self.queue = FanoutQueue(self.rooms)
        self.fanout = Fanout(self.rooms, self.queue, store.read, lambda users, conversation_id: ())
        self.sweep = Sweep(
            self.rooms,
            store.read,
            behind=self.fanout.fallen_behind,
            members_seen=nobody_asks,
            check_logins=trio.lowlevel.checkpoint,
        )

    @property
    def changes(self) -> list[Change]:
        return [change for group in self._groups for change in group.changes]

    async def submit(self, *commands: Any) -> None:
        for outcome in await self._writer.submit(commands).outcomes():
            assert not isinstance(outcome, ChatError)

    def version(self) -> int:
        with self.store._writing.connect() as connection:
            return lookups.heads(connection, [1])[1].members_version

    async def heard(self, *seqs: int, patience: float = 3.0) -> None:
        """Exactly these have been pushed, in this order."""
        expected = b"".join(text_frame(self.changes[seq - 1].payload) for seq in seqs)
        with trio.move_on_after(patience):
            while len(self.ear.heard) < len(expected):
                await trio.sleep(0.005)
        assert self.ear.heard == expected


@pytest.fixture
async def repairs(tmp_path: Path, nursery: trio.Nursery) -> Any:
    store = open_store(Database(url=f"sqlite:///{tmp_path}/x.db"))
    groups: list[Any] = []
    writer = store.writer(node=None, on_commit=groups.append)
    nursery.start_soon(writer.run)
    repairs = Repairs(store, writer, ear := Ear(), groups)
    await nursery.start(repairs.fanout.run)
    await nursery.start(repairs.sweep.run)
    with Membership(repairs.rooms) as mine:
        subscription = mine.join(1, ear, entitled=True)
        subscription.settle(0)
        repairs.fanout.opened(subscription.room, 0, None, 0)
        await writer.submit(
            [Create(conversation_id=1, user_id=1, content=f"m{n}") for n in range(400)]
        ).outcomes()
        yield repairs
    store.close()


async def test_a_hole_is_read_from_the_database(repairs: Repairs) -> None:
    """The hole, and what was committed after it: within the second that G5 allows."""
    repairs.queue.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.queue.changes([repairs.changes[203]])
    await repairs.heard(*range(1, 401), patience=1)


async def test_a_hole_that_fills_by_itself_is_not_read(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reading(*_: Any) -> Any:
        raise AssertionError("the database was asked")

    monkeypatch.setattr("chatd.hub.fanout.fanout.HOLE_WAIT", 0.2)
    monkeypatch.setattr(lookups, "changes_after", no_reading)
    echoes = [replace(repairs.changes[seq - 1], previous=UNSET) for seq in (3, 1)]  # from an outbox
    for change in [*(repairs.changes[seq - 1] for seq in (2, 1, 4, 3)), *echoes]:
        repairs.queue.changes([change])
        await wait_all_tasks_blocked()  # the fanout has seen the hole before it is filled
    await repairs.heard(1, 2, 3, 4)
    await trio.sleep(0.3)  # longer than a hole is waited for


async def test_a_hole_that_fills_while_it_is_read_starts_nobody_over(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read begins below the head of then: the rest of it is what follows."""
    asked, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        asked.set()
        go_on.wait(3)
        return missing(*arguments)

    missing = lookups.missing
    monkeypatch.setattr(lookups, "missing", slowly)
    repairs.queue.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.queue.changes([repairs.changes[203]])
    assert await trio.to_thread.run_sync(asked.wait, 3)
    repairs.queue.changes(repairs.changes[200:203])
    await repairs.heard(*range(1, 205))
    go_on.set()
    await repairs.heard(*range(1, 401))
    assert not repairs.ear.resynced


async def test_more_than_can_be_pushed_makes_everybody_start_over(repairs: Repairs) -> None:
    repairs.sweep.soon()
    with trio.fail_after(3):
        while not repairs.ear.resynced:
            await trio.sleep(0.005)
    assert repairs.ear.heard == b"", "400 missed changes are not pushed"


async def test_a_forged_change_blocks_nobody(repairs: Repairs) -> None:
    """A seq that the database does not know, with a hole before it, is given up."""
    repairs.queue.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.queue.changes([Change(1, 10_000, Kind.CREATED, b"forged")])
    await repairs.heard(*range(1, 401))
    with trio.fail_after(2):
        while repairs.rooms.get(1).ahead:  # type: ignore[union-attr]
            await trio.sleep(0.01)


async def test_without_redis_in_sight_a_hole_is_read_at_once(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.hub.fanout.fanout.HOLE_WAIT", 60)
    repairs.queue.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    repairs.fanout._up = False  # as `links(False)` does
    repairs.queue.changes([repairs.changes[250]])
    await repairs.heard(*range(1, 401))


async def test_a_late_removal_does_not_undo_a_return(repairs: Repairs) -> None:
    """The signal outlived an outage; meanwhile the user was added again, and the room knows it."""
    repairs.rooms.get(1).members_version = 6  # type: ignore[union-attr]
    repairs.queue.member(
        MemberChange(1, Ear.user_id, State.REMOVED, None, version=5)
    )  # Ear asserts: not dropped
    repairs.queue.changes(repairs.changes[:1])
    with trio.fail_after(2):
        while not repairs.ear.heard:
            await trio.sleep(0.005)


async def test_a_burst_over_a_room_that_people_leave_ends_nothing(repairs: Repairs) -> None:
    leavers: list[Membership] = []

    class Leaver(Ear):
        def try_push(self, frames: bytes) -> bool:
            return False

        def fall_behind(self, subscription: Subscription) -> None:
            assert subscription.joined, "its nursery is gone"
            subscription.wait()
            for one in leavers:
                one.leave(1)

    for _ in range(400):
        mine = Membership(repairs.rooms)
        repairs.fanout.opened(mine.join(1, Leaver(), entitled=True).room, 0, None, 0)
        next(iter(mine)).settle(0)
        leavers.append(mine)
    big = [Change(1, seq, Kind.CREATED, b"x" * 100_000, previous=None) for seq in range(1, 8)]
    repairs.queue.changes(big)
    await until(lambda: len(repairs.ear.heard) > 700_000)
    await wait_all_tasks_blocked()


async def test_an_overrun_queue_is_made_up_for(repairs: Repairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatd.hub.fanout.queue.QUEUE_BYTES", 200 * 180)
    for start in range(0, 400, 100):
        repairs.queue.changes(repairs.changes[start : start + 100])
    await repairs.heard(*range(1, 401))


# Histories.


async def until(condition: Callable[[], object], patience: float = 3.0) -> None:
    with trio.fail_after(patience):
        while not condition():
            await trio.sleep(0.005)


async def test_an_echo_is_held_against_the_database_once(repairs: Repairs) -> None:
    """It could be of another history. It is not, so nobody is told to start over."""
    repairs.queue.changes(repairs.changes[:200])
    await repairs.heard(*range(1, 201))
    database = watched(repairs)
    repairs.queue.changes(repairs.changes[50:80])
    await repairs.heard(*range(1, 401))  # what was read with it
    assert (database.asked, repairs.ear.resynced) == (["missing"], [])
    repairs.queue.changes(repairs.changes[200:])  # the bus brings it too
    await wait_all_tasks_blocked()
    assert database.asked == ["missing"]


async def test_the_first_change_of_another_history_starts_the_room_over(repairs: Repairs) -> None:
    repairs.queue.changes(repairs.changes)
    await repairs.heard(*range(1, 401))
    rewind(repairs, 300)
    late = repairs.changes[350]
    repairs.queue.changes([replace(late, seq=301, mark="another", previous=repairs.changes[299].mark)])
    await until(lambda: repairs.ear.resynced)
    room = repairs.rooms.get(1)
    assert room is not None
    assert (room.head, room.mark) == (300, repairs.changes[299].mark)
    await until(lambda: not room.behind and not room.repairing)
    assert len(repairs.ear.resynced) == 1


async def test_a_relayed_change_does_not_join_two_histories(repairs: Repairs) -> None:
    """The room missed where the other history began, and the outbox does not say what this change follows."""
    lost = [replace(change, mark=f"lost {change.seq}") for change in repairs.changes[:350]]
    repairs.queue.changes(
        [replace(one, previous=f"lost {one.seq - 1}" if one.seq > 1 else None) for one in lost]
    )
    await repairs.heard(*range(1, 351))
    repairs.queue.changes(relayed(repairs.changes[350:351]))
    await until(lambda: repairs.ear.resynced)
    await repairs.heard(*range(1, 351))
    room = repairs.rooms.get(1)
    assert room is not None
    assert (room.head, room.mark) == (400, repairs.changes[-1].mark)


async def test_the_sweep_finds_that_the_database_went_back(repairs: Repairs) -> None:
    repairs.queue.changes(repairs.changes)
    await repairs.heard(*range(1, 401))
    await repairs.sweep.once()
    await wait_all_tasks_blocked()
    assert not repairs.ear.resynced
    rewind(repairs, 300)
    await repairs.sweep.once()
    await until(lambda: repairs.ear.resynced)


async def test_a_room_that_retention_has_overtaken_is_not_called_another_history(repairs: Repairs) -> None:
    repairs.queue.changes(repairs.changes[:5])
    await repairs.heard(1, 2, 3, 4, 5)
    with repairs.store._writing.begin() as connection:
        connection.exec_driver_sql("DELETE FROM chat_changes WHERE seq < 390")
        connection.exec_driver_sql("UPDATE chat_conversations SET low_seq = 390")
    before = metrics.OTHER_HISTORIES._value.get()
    await repairs.sweep.once()
    await until(lambda: repairs.ear.resynced)
    room = repairs.rooms.get(1)
    assert room is not None
    assert (room.head, room.mark) == (400, repairs.changes[-1].mark)
    assert metrics.OTHER_HISTORIES._value.get() == before


def relayed(changes: list[Change]) -> list[Change]:
    """As an outbox brings them."""
    return [replace(change, members_version=2**53 - 1, previous=UNSET) for change in changes]


def rewind(repairs: Repairs, seq: int) -> None:
    with repairs.store._writing.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM chat_changes WHERE seq > {seq}")
        connection.exec_driver_sql(f"UPDATE chat_conversations SET last_seq = {seq}, marked_seq = {seq}")


# Doubt: what comes after a removal that nobody told us of.


class Outsider(Ear):
    """Somebody who is no member any more, and was not told."""

    user_id = 2

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    def dropped(self, subscription: Subscription) -> None:
        self.ended = True
        subscription.joined = False
        del subscription.room.subscriptions[subscription]


class Reading:
    """A reader that does not answer for some conversations until it is told to."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read
        self.away: set[int] = set()
        self.asked: list[str] = []

    async def __call__(self, what: Callable[..., Any], *arguments: Any) -> Any:
        self.asked.append(what.__name__)
        if isinstance(arguments[0], int) and arguments[0] in self.away:
            await trio.sleep(0.05)
            raise Unavailable
        return await self._read(what, *arguments)


def watched(repairs: Repairs) -> Reading:
    reading: Any = Reading(repairs.store.read)
    repairs.fanout._read = repairs.fanout._repairs._read = reading
    return reading


def enter(repairs: Repairs, ear: Ear, conversation: int, version: int) -> Membership:
    mine = Membership(repairs.rooms)
    subscription = mine.join(conversation, ear, entitled=False)
    subscription.settle(0)
    repairs.fanout.opened(subscription.room, 0, None, version)
    return mine


def after_a_removal(changes: list[Change]) -> list[Change]:
    """As if somebody had been removed before them, unnoticed."""
    return [replace(change, members_version=1) for change in changes]


async def test_who_was_removed_hears_nothing_while_the_database_is_away(
    repairs: Repairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6 before speed: the room waits for the database, and goes on without a hole when it is back."""
    monkeypatch.setattr("chatd.hub.fanout.fanout.RETRY", 0.05)
    database = watched(repairs)
    database.away.add(1)
    gone = Outsider()
    enter(repairs, gone, 1, version=0)
    repairs.queue.changes(after_a_removal(repairs.changes[:2]))
    repairs.queue.changes(after_a_removal(repairs.changes[2:4]))
    with trio.fail_after(3):
        while database.asked.count("rights") < 3:
            await trio.sleep(0.005)
    assert repairs.ear.heard == gone.heard == b""
    database.away.clear()
    await repairs.heard(1, 2, 3, 4)
    assert gone.ended
    assert gone.heard == b""
    asked = len(database.asked)
    repairs.queue.changes(after_a_removal(repairs.changes[4:6]))
    await repairs.heard(1, 2, 3, 4, 5, 6)
    assert len(database.asked) == asked, "nothing is in doubt any more"


async def test_a_room_in_doubt_holds_up_no_other(repairs: Repairs) -> None:
    database = watched(repairs)
    database.away.add(1)
    other = Ear()
    enter(repairs, other, 2, version=5)
    repairs.queue.changes(after_a_removal(repairs.changes[:1]))
    frame = b'{"event":"message","conversation_id":2}'
    repairs.queue.changes([Change(2, 1, Kind.CREATED, frame, members_version=5, previous=None)])
    with trio.fail_after(0.5):
        while not other.heard:
            await trio.sleep(0.005)
    assert repairs.ear.heard == b""


async def test_what_was_told_late_is_asked_for_once(repairs: Repairs) -> None:
    """Rows from the outbox do not know their version any more, nor what came before: one read tells both."""
    repairs.queue.changes(repairs.changes[:350])
    await repairs.heard(*range(1, 351))
    database = watched(repairs)
    repairs.queue.changes(relayed(repairs.changes[350:]))
    await repairs.heard(*range(1, 401))
    assert database.asked == ["missing"]


@pytest.mark.parametrize(
    "commands",
    [
        [SetMember(conversation_id=1, user_id=1, state=State.ACTIVE, role="moderator")],
        [
            SetMember(
                conversation_id=1, user_id=1, state=State.ACTIVE, muted_until="2999-01-01T00:00:00.000000Z"
            )
        ],
        [SetMember(conversation_id=1, user_id=2, state=State.ACTIVE)],
        [Create(conversation_id=1, user_id=3, content="a new member")],
        [
            SetMember(conversation_id=1, user_id=8, state=State.REMOVED),
            SetMember(conversation_id=1, user_id=8, state=State.ACTIVE, role="moderator"),
            SetMember(conversation_id=1, user_id=9, state=State.BANNED),
        ],
    ],
    ids=["role", "mute", "add", "post", "removal"],
)
async def test_only_a_lost_right_makes_a_room_ask_the_database(
    repairs: Repairs, commands: list[Any], request: pytest.FixtureRequest
) -> None:
    """What another node has done with the members, of which nothing but the messages after it is heard."""
    await repairs.submit(SetMember(conversation_id=1, user_id=1, state=State.ACTIVE))
    repairs.rooms.get(1).members_version = repairs.version()  # type: ignore[union-attr]
    database = watched(repairs)
    repairs.queue.changes(repairs.changes[:200])
    await repairs.submit(*commands)
    await repairs.submit(Create(conversation_id=1, user_id=1, content="after"))
    repairs.queue.changes(repairs.changes[200:])
    await repairs.heard(*range(1, len(repairs.changes) + 1))
    removal = "removal" in request.node.callspec.id
    assert database.asked == (["rights"] if removal else [])


async def test_a_role_or_a_mute_is_nothing_for_the_sweep(repairs: Repairs) -> None:
    await repairs.sweep.once()
    repairs.sweep._read = database = Reading(repairs.store.read)  # type: ignore[assignment]
    for change in ({"role": "moderator"}, {"muted_until": "2999-01-01T00:00:00.000000Z"}):
        await repairs.submit(SetMember(conversation_id=1, user_id=1, state=State.ACTIVE, **change))
    await repairs.sweep.once()
    assert database.asked == ["heads"]
    await repairs.submit(SetMember(conversation_id=1, user_id=77, state=State.REMOVED))
    await repairs.sweep.once()
    assert database.asked == ["heads", "heads", "rights"]


async def test_doubt_is_bounded(repairs: Repairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatd.hub.fanout.fanout.RETRY", 0.05)
    database = watched(repairs)
    database.away.add(1)
    room = repairs.rooms.get(1)
    assert room is not None
    many = [Change(1, seq, Kind.CREATED, b"x", 9, previous=None) for seq in range(1, AHEAD_CHANGES + 2)]
    repairs.queue.changes(many)
    with trio.fail_after(3):
        while not (room.stale and len(database.asked) > 1):  # a try at reading takes the mark off for a moment
            await trio.sleep(0.001)
    assert len(room.ahead) <= AHEAD_CHANGES
    database.away.clear()
    with trio.fail_after(3):
        while not repairs.ear.resynced:  # 400 are more than a repair pushes
            await trio.sleep(0.005)


async def test_an_ephemeral_event_is_offered_a_message_is_pushed(repairs: Repairs) -> None:
    class Shedding(Ear):
        def offer(self, frames: bytes) -> bool:
            return False  # it reads too slowly

    slow = Shedding()
    enter(repairs, slow, 2, version=0)
    repairs.queue.foreign(2, "cursor.moved", b'{"event":"cursor.moved"}')
    repairs.queue.foreign(2, "message", b'{"event":"message"}')
    with trio.fail_after(2):
        while not slow.heard:
            await trio.sleep(0.005)
    assert slow.heard == text_frame(b'{"event":"message"}')


async def test_what_is_announced_in_one_go_is_merged_up_to_a_bound(repairs: Repairs) -> None:
    """Twenty events of 60 kB as one push would cut who reads; small ones still go together."""
    pushed: list[int] = []
    repairs.ear.offer = lambda frames: not pushed.append(len(frames))  # type: ignore[method-assign]
    for _ in range(20):
        repairs.queue.announce(Announcement(1, b"x" * 60_000, ephemeral=True))
    for _ in range(100):
        repairs.queue.announce(Announcement(1, b"x" * 100, ephemeral=True))
    await wait_all_tasks_blocked()
    assert sum(pushed) == 20 * 60_000 + 100 * 100
    assert max(pushed) <= 65_536
    assert len(pushed) == 21  # the last large one has room for some of the small


class Told(Ear):
    """Says that its subscription was ended."""

    def __init__(self, user_id: int, ended: Callable[[], None]) -> None:
        super().__init__()
        self.user_id, self._ended = user_id, ended

    def dropped(self, subscription: Subscription) -> None:
        self._ended()


async def all_removed(*_: Any) -> tuple[int, dict[int, State]]:
    await trio.lowlevel.checkpoint()
    return 5, dict.fromkeys(range(1000), State.REMOVED)


async def test_the_rights_of_a_crowd_are_looked_at_in_slices() -> None:
    rooms, steps = Rooms(), [0]

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(0)

    def ended() -> None:
        steps[-1] += 1

    for user in range(1000):
        rooms.join(1, Told(user, ended), entitled=False)
    trio.lowlevel.add_instrument(instrument := Steps())
    (room,) = rooms
    await sweep.check_rights(all_removed, room)  # type: ignore[arg-type]
    trio.lowlevel.remove_instrument(instrument)
    assert (sum(steps), max(steps), room.members_version) == (1000, sweep.YIELD_EVERY, 5)


async def test_a_doubt_that_comes_while_rights_are_looked_at_stays() -> None:
    """Of one who was looked at already, and whose fresh token does not open this room."""
    rooms = Rooms()

    def doubt() -> None:
        room.members_version = -1

    (room,) = {rooms.join(1, Told(user, doubt), entitled=False).room for user in range(3)}
    await sweep.check_rights(all_removed, room)  # type: ignore[arg-type]
    assert room.members_version == -1


class Line:
    """A connection that takes what it is told."""

    name = "line"

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery, self.told = nursery, bytearray()

    def push(self, frames: bytes) -> None:
        self.told += frames

    def try_push(self, frames: bytes) -> bool:
        self.told += frames
        return True

    def offer(self, frames: bytes) -> bool:
        self.told += frames
        return True

    @asynccontextmanager
    async def unhurried(self) -> AsyncIterator[None]:
        yield

    async def drained(self) -> None:
        pass


class Nobody:
    """Audiences that watch nothing."""

    def joined(self, subscription: Any) -> None:
        pass

    def left(self, subscription: Any) -> None:
        pass

    def visit(self, *_: Any, **__: Any) -> None:
        pass


class Slowly:
    """Conversations whose snapshots are read at once, and handed over when it is time to."""

    def __init__(self, real: Conversations) -> None:
        self._real, self.read, self.go_on = real, trio.Event(), trio.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return partial(self._wait, found) if name in ("enter", "enter_all") else found

    async def _wait(self, enter: Callable[..., Any], *arguments: Any) -> Any:
        found = await enter(*arguments)
        self.read.set()
        await self.go_on.wait()
        return found


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("way", ["enter", "enter_all"])
async def test_a_snapshot_that_is_older_than_a_removal_lets_nobody_hear_what_came_after(
    repairs: Repairs, nursery: trio.Nursery, way: str, told: bool
) -> None:
    """Somebody else's newer snapshot has opened the room, so the removal is no news there any more (G6)."""
    place, gone = 2, 8
    config = Config(api=Api(internal_token="x"))
    conversations = Slowly(Conversations(repairs.store.read, Settings(config), Presence("n", None)))
    parts: Any = SimpleNamespace(
        settings=Settings(config),
        chat=SimpleNamespace(conversations=conversations),
        rooms=repairs.rooms,
        fanout=repairs.fanout,
        queue=repairs.queue,
        sweep=repairs.sweep,
        audiences=Nobody(),
    )
    line: Any = Line(nursery)
    await repairs.submit(SetMember(conversation_id=place, user_id=gone, state=State.ACTIVE))
    slow = Subscriptions(parts, line, flat=False)
    slow.become(Identity(gone, 2**40, 0, frozenset()))

    async def come_in() -> None:
        if way == "enter_all":
            await slow.enter_all({place: Position()}, None, 1)
            return
        with suppress(NotFound):
            await slow.enter(slow.join(place), Position(), None, 1)

    nursery.start_soon(come_in)
    with trio.fail_after(3):
        await conversations.read.wait()  # it says that the user is a member, and nothing of the room is known
    await repairs.submit(SetMember(conversation_id=place, user_id=gone, state=State.REMOVED))
    removal = repairs._groups[-1].members[0]
    quick, version = Ear(), removal.version
    mine = Membership(repairs.rooms)
    opening = mine.join(place, quick, entitled=True)
    opening.settle(0)
    repairs.fanout.opened(opening.room, 0, None, version)
    if told:
        repairs.queue.member(removal)
    await wait_all_tasks_blocked()
    await repairs.submit(Create(conversation_id=place, user_id=9, content="secret"))
    repairs.queue.changes(repairs._groups[-1].changes)
    if told:
        repairs.queue.foreign(place, "news", b'{"event":"news","secret":1}')
    await wait_all_tasks_blocked()
    assert b"secret" in quick.heard
    conversations.go_on.set()
    await wait_all_tasks_blocked()
    assert b"secret" not in line.told
    with trio.fail_after(3):
        while slow.get(place) is not None:
            await trio.sleep(0.005)
    assert b"secret" not in line.told
    mine.leave_all()


async def test_a_room_that_waits_keeps_its_epoch_where_the_database_does_not_answer(
    repairs: Repairs, nursery: trio.Nursery
) -> None:
    """The integer that the client came with is of the history that its login named, also at the second try."""
    asked: list[tuple[Position, str | None]] = []

    class Away(Conversations):
        async def enter(
            self, identity: Identity, conversation_id: int, position: Position, epoch: str | None
        ) -> Any:
            asked.append((position, epoch))
            raise Unavailable

    config = Config(api=Api(internal_token="x"))
    parts: Any = SimpleNamespace(
        settings=Settings(config),
        chat=SimpleNamespace(conversations=Away(repairs.store.read, Settings(config), Presence("n", None))),
        rooms=repairs.rooms,
        fanout=repairs.fanout,
        queue=repairs.queue,
        sweep=repairs.sweep,
        audiences=Nobody(),
    )
    line: Any = Line(nursery)
    rooms = Subscriptions(parts, line, flat=False)
    rooms.become(Identity(1, 2**40, 0, frozenset()))
    subscription = rooms.join(1)
    subscription.wait_at(Position(5), "this history")  # as after a `ready` that had no room for its changes
    with pytest.raises(Unavailable):
        await rooms.enter(subscription, Position(9), "the client's word", 1)
    await until(lambda: len(asked) == 2)
    assert asked == [(Position(9), "the client's word"), (Position(5), "this history")]
    rooms.leave_all()
