"""Rooms are pure: what hypothesis and a thousand cancelled tasks cannot tear, nothing can."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace

from chatd.core.model import Change, Kind
from chatd.core.protocol import text_frame
from chatd.hub.fanout.chunks import Chunk, chunks
from chatd.hub.fanout.rooms import REMEMBERED, Membership, Room, Rooms
from chatd.hub.fanout.subscription import BUFFER_BYTES, Subscription


class Ear:
    """A listener that remembers. `flat` ones know nothing but messages."""

    def __init__(self, user_id: int = 1, *, flat: bool = False) -> None:
        self.user_id, self.flat = user_id, flat
        self.heard = bytearray()
        self.resyncs = self.falls = 0
        self.full = False  # its connection has no room

    def push(self, frames: bytes) -> None:
        self.heard += frames

    def try_push(self, frames: bytes) -> bool:
        if not self.full:
            self.push(frames)
        return not self.full

    def offer(self, frames: bytes) -> bool:
        return self.try_push(frames)

    def resync(self, subscription: Subscription) -> None:
        self.resyncs += 1

    def fall_behind(self, subscription: Subscription) -> None:
        self.falls += 1
        subscription.wait()

    def dropped(self, subscription: Subscription) -> None:
        raise AssertionError("nobody was removed")

    @property
    def seqs(self) -> list[int]:
        """What was heard: a payload of these tests is its seq in decimal."""
        found, rest = [], bytes(self.heard)
        while rest:
            size = rest[1]
            found.append(int(rest[2 : 2 + size]))
            rest = rest[2 + size :]
        return found


def change(seq: int, kind: Kind = Kind.CREATED) -> Change:
    return Change(1, seq, kind, str(seq).encode(), previous=None)


def chunk(*seqs: int) -> Chunk:
    return Chunk([change(seq) for seq in seqs])


def live(ear: Ear, cursor: int) -> Subscription:
    subscription = Subscription(Room(1), ear, entitled=True)
    subscription.settle(cursor)
    return subscription


@given(st.permutations(range(1, 30)), st.lists(st.integers(1, 29)), st.integers(0, 10))
def test_any_order_with_echoes_comes_out_once_and_in_order(
    order: list[int], echoes: list[int], head: int
) -> None:
    room = Room(1)
    room.open(head, None, 0)
    ear = Ear()
    subscription = live(ear, head)
    for seq in [*order, *echoes]:
        for one in chunks(room.accept([change(seq)])):
            subscription.deliver(one)
            subscription.deliver(one)  # an echo through Redis, say
    assert ear.seqs == list(range(head + 1, 30))
    assert not room.ahead


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans()), min_size=1), st.integers(1, 7))
def test_who_falls_behind_misses_nothing(steps: list[tuple[int, bool, bool]], portion: int) -> None:
    """Changes come while its connection is full and while it is not; what it missed is read in portions."""
    room = Room(1)
    room.open(0, None, 0)
    ear = Ear()
    subscription = live(ear, 0)
    for count, ear.full, reads in steps:
        reached = room.head or 0
        if reads and subscription.buffering:
            end = min(room.head or 0, subscription.cursor + portion)
            subscription.hold()
            ear.heard += b"".join(
                text_frame(str(seq).encode()) for seq in range(subscription.cursor + 1, end + 1)
            )
        else:
            reads = False
        for one in chunks(room.accept([change((room.head or 0) + 1 + n) for n in range(count)])):
            subscription.deliver(one)
        if reads and end == reached and subscription.fits(end):
            subscription.settle(end)
        elif reads:
            subscription.cursor = end
            subscription.wait()
    assert ear.seqs == list(range(1, subscription.cursor + 1))
    assert subscription.buffering or subscription.cursor == room.head


def test_what_was_buffered_goes_no_further_than_there_is_room() -> None:
    """Ten rooms that were busy while a client came in would be more than its outbox."""
    ear = Ear()
    subscription = Subscription(Room(1), ear, entitled=True)
    subscription.deliver(chunk(4, 5))
    ear.full = True
    subscription.settle(4)
    assert (ear.seqs, ear.falls, subscription.cursor) == ([], 1, 4)
    assert subscription.lost, "it is read from the database"


@given(st.lists(st.integers(1, 12), min_size=1), st.integers(0, 12), st.integers(0, 12))
def test_a_snapshot_and_what_was_buffered_meanwhile_fit_together(
    steps: list[int], joined_at: int, snapshot_lag: int
) -> None:
    """Join when the head is `joined_at`; the snapshot is read some changes later, answered after more."""
    room = Room(1)
    room.open(joined_at, None, 0)
    ear = Ear()
    subscription = Subscription(room, ear, entitled=True)
    head = joined_at
    for step in steps:
        for one in chunks(room.accept([change(seq) for seq in range(head + 1, head + step + 1)])):
            subscription.deliver(one)
        head += step
    snapshot = min(head, joined_at + snapshot_lag)
    subscription.settle(snapshot)
    assert ear.seqs == list(range(snapshot + 1, head + 1))


def test_changes_before_the_first_snapshot_wait_for_it() -> None:
    room = Room(1)
    assert room.accept([change(4), change(5), change(3)]) == []
    room.open(3, None, members_version=7)
    assert [c.seq for c in room.accept([])] == [4, 5]
    assert room.head == 5


def test_a_snapshot_from_before_the_room_was_opened_is_not_enough() -> None:
    """Two enter an empty room at once: the first snapshot opens it, and what lies below is pushed to nobody."""
    room = Room(1)
    first, second = Ear(), Ear()
    quick, slow = Subscription(room, first, entitled=True), Subscription(room, second, entitled=True)
    room.accept([change(seq) for seq in range(1, 6)])
    assert quick.fits(5)
    quick.settle(5)
    room.open(5, None, 0)
    assert not slow.fits(3), "4 and 5 are in no buffer"
    slow.hold()
    assert slow.fits(5)
    for one in chunks(room.accept([change(6)])):
        quick.deliver(one)
        slow.deliver(one)
    slow.settle(5)
    assert (first.seqs, second.seqs) == ([6], [6])


def test_a_hole_holds_back_what_follows_it() -> None:
    room = Room(1)
    room.open(0, None, 0)
    assert room.accept([change(2), change(3)]) == []
    assert room.behind
    assert [c.seq for c in room.accept([change(1)])] == [1, 2, 3]
    assert not room.behind


def test_a_room_that_holds_too_much_reads_the_database_instead() -> None:
    room = Room(1)
    room.open(0, None, 0)
    room.accept([change(seq) for seq in range(2, 1003)])
    assert not room.ahead
    assert room.stale
    assert room.behind


def test_a_buffer_that_overflows_asks_for_another_snapshot() -> None:
    ear = Ear()
    subscription = Subscription(Room(1), ear, entitled=True)
    big = Change(1, 1, Kind.CREATED, b"x" * (BUFFER_BYTES + 1), previous=None)
    subscription.deliver(Chunk([big]))
    assert subscription.lost
    subscription.hold()
    assert not subscription.lost


def test_a_subscription_that_would_miss_something_says_so_instead() -> None:
    ear = Ear()
    subscription = live(ear, cursor=3)
    subscription.deliver(chunk(6, 7))
    assert (ear.seqs, ear.resyncs) == ([], 1)


def test_a_flat_listener_gets_new_messages_only() -> None:
    ear = Ear(flat=True)
    subscription = live(ear, cursor=1)
    subscription.deliver(Chunk([change(1), change(2), change(3, Kind.EDITED), change(4)]))
    assert ear.seqs == [2, 4]


# Histories. A change of one is its mark: the letter of the history, and its seq.


def marked(history: str, seq: int, fork: int = 0) -> Change:
    """Up to the fork all histories are one."""

    def mark(seq: int) -> str | None:
        return f"{history if seq > fork else 'a'}{seq}" if seq else None

    return Change(1, seq, Kind.CREATED, str(seq).encode(), 0, mark(seq), mark(seq - 1))


def at(head: int, history: str = "a") -> Room:
    room = Room(1)
    room.open(head, marked(history, head).mark, 0)
    return room


def test_a_change_that_follows_another_one_is_not_taken() -> None:
    room = at(5)
    assert room.accept([marked("b", 6)]) == []
    assert room.stale
    assert room.behind
    assert not room.in_doubt, "it is the history that is doubted, not who may hear it"
    assert [c.mark for c in room.accept([marked("a", 6)])] == ["a6"]


def test_a_change_of_which_nobody_knows_what_came_before_is_read_again() -> None:
    """The change at the head may have been missed as well, and then this one is of another history."""
    room = at(5)
    relayed = replace(marked("b", 6), previous=UNSET)
    assert room.accept([relayed]) == []
    assert room.behind
    room.stale = False  # a repair has begun to read
    assert room.accept([relayed]) == []
    assert [c.mark for c in room.accept([marked("a", 6)])] == ["a6"], "the database's"


def test_an_old_change_that_is_known_is_no_surprise() -> None:
    room = at(5)
    room.accept([marked("a", 5)])
    assert not room.stale, "it is the head"
    room.remember([marked("a", 3), marked("a", 4)])
    room.accept([marked("a", 4), marked("a", 3)])
    assert not room.stale, "a repair had brought them"
    room.accept([Change(1, 2, Kind.CREATED, b"2")])
    assert not room.stale, "what an outbox brings late says nothing"


@pytest.mark.parametrize("seq", [5, 4, 1])
def test_an_old_change_of_another_history_makes_a_room_doubt(seq: int) -> None:
    room = at(5)
    room.remember([marked("a", 4)])
    room.accept([marked("b", seq)])
    assert room.stale


def test_what_a_repair_brought_is_remembered_within_bounds() -> None:
    room = at(1000)
    room.remember([marked("a", seq) for seq in range(1, 1001)])
    assert room._repaired is not None
    assert list(room._repaired) == list(range(1001 - REMEMBERED, 1001))


def test_a_room_begins_anew_below_where_it_was() -> None:
    room = at(9)
    room.accept([marked("a", 11)])
    slow = Subscription(room, Ear(), entitled=True)
    room.begin_anew(5, "a5", 3)
    assert (room.head, room.mark, room.members_version, room.ahead) == (5, "a5", 3, {})
    assert room.behind, "what was committed meanwhile has to be read"
    assert slow.fits(5)
    assert [c.mark for c in room.accept([marked("b", 6, fork=5)])] == ["b6"]


def test_a_snapshot_of_another_history_makes_a_room_doubt() -> None:
    room = at(5)
    room.open(5, "a5", 0)
    assert not room.stale
    room.open(5, "b5", 0)
    assert room.stale


@pytest.mark.parametrize("flat", [False, True])
def test_a_subscription_takes_nothing_that_follows_another_change(flat: bool) -> None:
    """It was answered from the new history, and its room still tells the old one."""
    for run in ([6, 7], [4, 5, 6], [5, 6]):
        ear = Ear(flat=flat)
        subscription = Subscription(Room(1), ear, entitled=True)
        subscription.settle(5, "b5")
        subscription.deliver(Chunk([marked("a", seq) for seq in run]))
        assert (ear.seqs, ear.resyncs, subscription.cursor) == ([], 1, 5)
        subscription.deliver(Chunk([marked("b", seq) for seq in run]))
        assert (ear.seqs, ear.resyncs) == ([seq for seq in run if seq > 5], 1)


@given(st.data(), st.integers(0, 9))
def test_whatever_comes_a_room_tells_one_history(data: st.DataObject, fork: int) -> None:
    changes = {(h, seq): marked(h, seq, fork) for h in "ab" for seq in range(1, 13)}
    order = data.draw(st.lists(st.sampled_from(sorted(changes)), max_size=60))
    room, told = at(0), []
    for key in order:
        told += [change.mark for change in room.accept([changes[key]])]
    histories = [[changes[h, seq].mark for seq in range(1, len(told) + 1)] for h in "ab"]
    assert told in histories


def test_a_long_run_is_cut_into_pieces() -> None:
    run = [Change(1, seq, Kind.CREATED, b"x" * 20_000) for seq in range(1, 11)]
    cut = list(chunks(run))
    assert [(p.first, p.last) for p in cut] == [(1, 3), (4, 6), (7, 9), (10, 10)]


def test_a_room_goes_with_its_last_subscription() -> None:
    rooms = Rooms()
    with Membership(rooms) as mine:
        mine.join(1, Ear(), entitled=True)
        mine.join(2, Ear(), entitled=True)
        assert len(rooms) == 2
        assert mine.leave(1)
        assert not mine.leave(1)
        assert len(rooms) == 1
    assert len(rooms) == 0


@pytest.mark.parametrize("seed", range(3))
async def test_a_thousand_tasks_join_leave_and_are_cancelled_at_random_points(seed: int) -> None:
    """Afterwards the rooms are empty, and nobody has heard a room that it had left."""
    dice = random.Random(seed)
    rooms = Rooms()
    left: set[tuple[Ear, int]] = set()

    class Strict(Ear):
        def push(self, frames: bytes) -> None:
            conversation_id = int(bytes(frames[2:]).split(b":")[0])
            assert (self, conversation_id) not in left, "heard a room that it had left"
            self.heard += b"."

    async def wander(scope: trio.CancelScope) -> None:
        ear = Strict()
        with scope, Membership(rooms) as mine:
            try:
                for _ in range(dice.randrange(1, 60)):
                    conversation_id = dice.randrange(10)
                    left.discard((ear, conversation_id))
                    subscription = mine.join(conversation_id, ear, entitled=True)
                    await trio.lowlevel.checkpoint()
                    if subscription.joined and subscription.buffering:
                        room = rooms.get(conversation_id)
                        assert room is not None
                        room.open(0, None, 0)
                        subscription.settle(room.head or 0)
                    await trio.lowlevel.checkpoint()
                    if dice.random() < 0.5:
                        mine.leave(conversation_id)
                        left.add((ear, conversation_id))
            finally:
                left.update((ear, conversation_id) for conversation_id in range(10))

    async def publish() -> None:
        for _ in range(300):
            for room in rooms:
                if room.head is None:
                    continue
                payload = b"%d:%d" % (room.conversation_id, room.head + 1)
                following = Change(room.conversation_id, room.head + 1, Kind.CREATED, payload, previous=None)
                ready = room.accept([following])
                for one in chunks(ready):
                    for subscription in list(room.subscriptions):
                        subscription.deliver(one)
            await trio.lowlevel.checkpoint()

    async def cut(scopes: list[trio.CancelScope]) -> None:
        for scope in dice.sample(scopes, len(scopes)):
            if dice.random() < 0.7:
                scope.cancel()
            if dice.random() < 0.1:
                await trio.lowlevel.checkpoint()

    scopes = [trio.CancelScope() for _ in range(1000)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(wander, scope)
        nursery.start_soon(publish)
        nursery.start_soon(cut, scopes)
    assert len(rooms) == 0
    assert sum(scope.cancelled_caught for scope in scopes) > 100
