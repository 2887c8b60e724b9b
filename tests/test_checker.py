"""The checker sees what it is for, and takes nothing that may happen for a mistake."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.checker import GRACE, Verdict, check
from tests.faults.history import (
    Answered,
    Attempt,
    Client,
    Connected,
    Conversation,
    Disconnected,
    Heard,
    History,
    Kind,
    Logged,
    Outcome,
    Past,
    Picture,
    Seen,
    Stored,
    Unsubscribed,
)

ADA, GRACE_, MEMBER, OUTSIDER = 1, 2, 3, 4
EVENTS = {"created": "message", "edited": "message.updated", "deleted": "message.deleted"}


class World:
    """A chat that does everything right, one step after the other; each step takes a second.

    Its database can go back to a copy of itself, after which ids and seqs are given out a second time.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.attempts: list[Attempt] = []
        self.room = Conversation(1, 0, [], [])
        self.clients = {
            user: Client(f"client {user}", user, user == OUTSIDER, [], {}, [])
            for user in (ADA, GRACE_, MEMBER, OUTSIDER)
        }
        self.live: set[int] = set()
        self.removed: set[int] = set()
        self.marks = itertools.count(1)
        self.held: dict[int, str | None] = {}  # the mark that goes with a client's cursor
        self.past: list[Past] = []
        self.began_with = 0  # the head of the room when the database last went back

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    # What a backend does.

    def post(self, body: str, *outcomes: Outcome, user: int = ADA) -> Stored:
        """Committed once; answered as the outcomes say, ok if none are given. A FAIL is not committed."""
        outcomes = outcomes or (Outcome.OK,)
        row = Stored(len(self.room.messages) + 1, user, self.room.last_seq + 1, body, body)
        for number, outcome in enumerate(outcomes):
            began, ended = self.tick(), self.tick()
            ok = outcome is Outcome.OK
            id, seq = (row.id, row.seq) if ok else (0, 0)
            attempt = Attempt(Kind.POST, 1, user, body, began, ended, outcome, id, seq, ok and number > 0)
            self.attempts.append(attempt)
        if set(outcomes) != {Outcome.FAIL}:
            self.room.messages.append(row)
            self._log("created", row)
        return row

    def edit(self, row: Stored, body: str) -> None:
        row.content = body
        self._change(Kind.EDIT, row, body, "edited")

    def delete(self, row: Stored) -> None:
        row.content = None
        self._change(Kind.DELETE, row, f"{row.client_id} deleted", "deleted")

    def _change(self, kind: Kind, row: Stored, body: str, logged: str) -> None:
        began, ended = self.tick(), self.tick()
        seq = self.room.last_seq + 1
        self.attempts.append(
            Attempt(kind, 1, ADA, body, began, ended, Outcome.OK, row.id, seq, of=row.client_id or "")
        )
        self._log(logged, row)

    def _log(self, kind: str, row: Stored) -> None:
        self.room.last_seq += 1
        entry = Logged(self.room.last_seq, kind, row.id, f"mark {next(self.marks)}")
        self.room.log.append(entry)
        for user in sorted(self.live):
            self.clients[user].records.append(Heard(self.now, 1, self._seen(entry)))
            self._moved(user)

    def _moved(self, user: int) -> None:
        """The client has everything."""
        self.clients[user].cursors[1], self.held[user] = self.room.last_seq, self.mark

    @property
    def mark(self) -> str | None:
        return self.room.log[-1].mark if self.room.log else None

    def _seen(self, entry: Logged) -> Seen:
        row = self.room.messages[entry.id - 1]
        return Seen(entry.seq, entry.id, EVENTS[entry.kind], row.content, row.client_id, entry.mark)

    def remove(self, user: int = MEMBER, outcome: Outcome = Outcome.OK) -> None:
        self._member(Kind.REMOVE, user, outcome)
        self.removed.add(user)
        if user in self.live:
            self.clients[user].records.append(Unsubscribed(self.now, 1, "not_found"))
            self.live.discard(user)
            self.clients[user].cursors.pop(1, None)

    def add(self, user: int = MEMBER, outcome: Outcome = Outcome.OK) -> None:
        self._member(Kind.ADD, user, outcome)
        self.removed.discard(user)

    def _member(self, kind: Kind, user: int, outcome: Outcome) -> None:
        name = f"{kind} {len(self.attempts)}"
        self.attempts.append(Attempt(kind, 1, user, name, self.tick(), self.tick(), outcome))

    # What a client does.

    def come(self, user: int) -> None:
        """Connect and resume from the cursor it has."""
        client = self.clients[user]
        client.records.append(Connected(self.tick()))
        if user in self.removed:
            client.records.append(Unsubscribed(self.now, 1, "not_found"))
            client.cursors.pop(1, None)
            return
        self._answer(user, client.cursors.get(1))
        self.live.add(user)

    def _answer(self, user: int, after: int | None, *, asked: bool = True) -> None:
        if after is None or self.knows(user, after):
            recovered, changes = True, [] if after is None else list(map(self._seen, self.room.log[after:]))
        else:
            created = [entry for entry in self.room.log if entry.kind == "created"][-50:]
            recovered, changes = False, [self._as_created(entry) for entry in created]
        record = Answered(self.now, 1, after, recovered, self.room.last_seq, changes, asked, self.mark)
        self.clients[user].records.append(record)
        self._moved(user)

    def knows(self, user: int, after: int) -> bool:
        """Whether what the client has is of this history."""
        return after <= self.room.last_seq and (after == 0 or self.room.log[after - 1].mark == self.held[user])

    def _as_created(self, entry: Logged) -> Seen:
        seen = self._seen(entry)
        seen.event, seen.mark = "message.deleted" if seen.body is None else "message", None
        return seen

    # What an operator does.

    def copy(self) -> tuple[Conversation, set[int]]:
        return deepcopy((self.room, self.removed))

    def go_back(self, copy: tuple[Conversation, set[int]], *, told: bool = True) -> None:
        """Those who are there and have something that is gone are told, or should be."""
        self.past.append(Past(self.tick(), self.tick(), [self.room], [deepcopy(copy[0])]))
        self.room, self.removed = deepcopy(copy)
        self.began_with = self.room.last_seq
        for user in sorted(self.live):
            if user in self.removed:
                self.clients[user].records.append(Unsubscribed(self.now, 1, "not_found"))
                self.live.discard(user)
                self.clients[user].cursors.pop(1, None)
            elif told and not self.knows(user, cursor := self.clients[user].cursors[1]):
                self._answer(user, cursor, asked=False)
            elif told:  # the copy may be newer than the history that it ends
                missed = (Heard(self.now, 1, self._seen(entry)) for entry in self.room.log[cursor:])
                self.clients[user].records += missed
                self._moved(user)

    def go(self, user: int) -> None:
        self.clients[user].records.append(Disconnected(self.tick(), 0))
        self.live.discard(user)

    def end(self) -> History:
        for user in sorted({ADA, GRACE_, MEMBER} - self.live - self.removed):
            self.come(user)
        return History(self.attempts, list(self.clients.values()), [self.room], self.tick(), self.past)


def plain() -> World:
    """Posts, an edit, a deletion, a retry; one client that was away and one that was removed and came back."""
    world = World()
    for user in (ADA, GRACE_, MEMBER):
        world.come(user)
    one = world.post("one")
    world.post("two", Outcome.INFO, Outcome.OK)
    world.go(GRACE_)
    world.edit(one, "one, edited")
    world.remove()
    world.post("three")
    world.post("four")
    world.add()
    world.come(MEMBER)
    world.come(GRACE_)
    world.delete(one)
    world.post("five")
    world.post("never answered", Outcome.INFO)
    world.post("refused", Outcome.FAIL)
    return world


def names(verdict: Verdict) -> set[str]:
    return {anomaly.name for anomaly in verdict.anomalies}


def test_what_is_right_is_valid() -> None:
    verdict = check(plain().end())
    assert (verdict.valid, verdict.anomalies) == (True, [])
    assert (verdict.acknowledged, verdict.unknown, verdict.failed) == (9, 2, 1)


def heard(history: History, user: int = ADA) -> list[Heard]:
    return [record for record in _client(history, user).records if isinstance(record, Heard)]


def _client(history: History, user: int) -> Client:
    return next(client for client in history.clients if client.user == user)


def _post(history: History, body: str) -> Attempt:
    return next(a for a in history.attempts if a.body == body and a.outcome is Outcome.OK)


# Each plants one thing into a valid history, and says what it is called.


def lose_a_write(history: History) -> str:
    room = history.final[0]
    room.messages = [row for row in room.messages if row.client_id != "three"]
    return "lost-write"


def lose_an_edit(history: History) -> str:
    edited = next(entry for entry in history.final[0].log if entry.kind == "edited")
    edited.kind = "created"
    return "lost-write"


def store_it_twice(history: History) -> str:
    room = history.final[0]
    room.last_seq += 1
    row = room.messages[1]
    room.messages.append(Stored(99, row.user, room.last_seq, row.client_id, row.content))
    room.log.append(Logged(room.last_seq, "created", 99))
    return "duplicate-write"


def answer_another_seq(history: History) -> str:
    _post(history, "four").seq += 1
    return "ack-disagrees"


def answer_a_retry_differently(history: History) -> str:
    ack = _post(history, "two")
    history.attempts.append(Attempt(Kind.POST, 1, ADA, "two", 90, 91, Outcome.OK, ack.id, ack.seq + 5, True))
    return "ack-disagrees"


def number_twice(history: History) -> str:
    history.final[0].log[4].seq = history.final[0].log[3].seq
    return "duplicate-seq"


def leave_a_hole(history: History) -> str:
    del history.final[0].log[2]
    return "seq-hole"


def store_what_nobody_asked_for(history: History) -> str:
    history.attempts = [attempt for attempt in history.attempts if attempt.body != "five"]
    return "phantom"


def show_what_was_refused(history: History) -> str:
    for attempt in history.attempts:
        if attempt.body == "never answered":
            attempt.outcome = Outcome.FAIL
    return "failed-visible"


def turn_the_order(history: History) -> str:
    for attempt in history.attempts:
        if attempt.body == "one":  # its seq is 1, and it was asked for when others had been answered
            attempt.invoked, attempt.ended = 40.0, 41.0
    return "realtime-order"


def skip_one(history: History) -> str:
    records = _client(history, ADA).records
    records.remove(heard(history)[2])
    return "skip"


def skip_one_in_a_replay(history: History) -> str:
    replay = next(r for r in _client(history, GRACE_).records if isinstance(r, Answered) and len(r.changes) > 2)
    del replay.changes[1]
    return "skip"


def hear_it_twice(history: History) -> str:
    records = _client(history, ADA).records
    records.insert(records.index(heard(history)[2]), heard(history)[2])
    return "duplicate-receive"


def hear_the_old_again(history: History) -> str:
    records = _client(history, ADA).records
    records.insert(records.index(heard(history)[4]), heard(history)[1])
    return "nonmonotonic-receive"


def start_over_for_nothing(history: History) -> str:
    replay = next(
        r for r in _client(history, GRACE_).records if isinstance(r, Answered) and r.after is not None
    )
    replay.recovered = False
    replay.changes = []
    return "needless-reset"


def hear_what_was_not_kept(history: History) -> str:
    heard(history)[-1].seen.id = 77
    return "delivered-not-durable"


def hear_another_change(history: History) -> str:
    heard(history)[-1].seen.event = "message.deleted"
    return "inconsistent-seq"


def hear_another_text(history: History) -> str:
    heard(history)[-1].seen.body = "something else"
    return "inconsistent-seq"


def let_an_outsider_in(history: History) -> str:
    _client(history, OUTSIDER).records.append(Answered(50.0, 1, None, True, 3, []))
    return "leak"


def let_an_outsider_hear(history: History) -> str:
    _client(history, OUTSIDER).records.append(deepcopy(heard(history)[0]))
    return "leak"


def let_the_removed_hear(history: History) -> str:
    """ "Four" was asked for two seconds after the removal, and reaches the member before it is back."""
    four = next(record for record in heard(history) if record.seen.body == "four")
    records = _client(history, MEMBER).records
    gone = next(number for number, record in enumerate(records) if isinstance(record, Unsubscribed))
    records.insert(gone, deepcopy(four))
    return "leak"


def forget_somebody(history: History) -> str:
    _client(history, ADA).cursors[1] -= 1
    return "unseen"


PLANTS = [
    lose_a_write, lose_an_edit, store_it_twice, answer_another_seq, answer_a_retry_differently, number_twice,
    leave_a_hole, store_what_nobody_asked_for, show_what_was_refused, turn_the_order, skip_one,
    skip_one_in_a_replay, hear_it_twice, hear_the_old_again, start_over_for_nothing, hear_what_was_not_kept,
    hear_another_change, hear_another_text, let_an_outsider_in, let_an_outsider_hear, let_the_removed_hear,
    forget_somebody,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found(plant: Callable[[History], str]) -> None:
    history = plain().end()
    expected = plant(history)
    verdict = check(history)
    assert verdict.valid is False
    assert expected in names(verdict)


# A database that goes back in time: ADA and GRACE_ have something that is gone then, MEMBER has not.


def gone_back(*, told: bool = True, proves: bool = True) -> World:
    """ADA stays. GRACE_ comes back when the new history has passed her cursor. MEMBER comes back with a cursor
    from before the copy was taken.
    """
    world = World()
    for user in (ADA, GRACE_, MEMBER):
        world.clients[user].proves = proves
        world.come(user)
    kept = world.post("kept")
    world.go(MEMBER)
    world.post("kept, too")
    copy = world.copy()
    for number in range(3):
        world.post(f"gone {number}")
    world.edit(kept, "an edit that is gone")
    world.go(GRACE_)
    world.go_back(copy, told=told)
    for number in range(6):
        row = world.post(f"new {number}")
    world.edit(row, "an edit that stays")
    world.come(MEMBER)
    if told:
        world.come(GRACE_)
    return world


def answers(history: History, user: int) -> list[Answered]:
    return [record for record in _client(history, user).records if isinstance(record, Answered)]


def test_what_is_lost_with_the_database_is_counted_and_no_anomaly() -> None:
    history = gone_back().end()
    verdict = check(history)
    assert (verdict.valid, verdict.anomalies) == (True, [])
    assert len(verdict.gone) == 4
    assert [(a.recovered, a.asked) for a in answers(history, ADA)] == [(True, True), (False, False)]
    assert [a.recovered for a in answers(history, GRACE_)] == [True, False]
    assert [a.recovered for a in answers(history, MEMBER)] == [True, True]


def resume_by_number(history: History) -> str:
    """A server that does not look at the mark."""
    new = _client(history, ADA).records[-7:]
    answer = answers(history, GRACE_)[-1]
    after = answer.after or 0
    answer.recovered, answer.changes = (
        True,
        [r.seen for r in new if isinstance(r, Heard) and r.seen.seq > after],
    )
    return "moved-silently"


def resume_from_beyond_the_head(history: History) -> str:
    answer = answers(history, GRACE_)[-1]
    answer.recovered, answer.seq, answer.changes = True, (answer.after or 0) - 1, []
    answer.mark = None
    return "moved-silently"


def drop_what_is_numbered_again(history: History) -> str:
    """A server whose head stays where it was: who is there hears nothing until the new history passes it."""
    records = _client(history, ADA).records
    told = answers(history, ADA)[-1]
    head = told.after or 0
    first = records.index(told)
    kept = [r for r in records[first + 1 :] if isinstance(r, Heard) and r.seen.seq > head]
    _client(history, ADA).records = [*records[:first], *kept]
    return "moved-silently"


def leave_somebody_in_the_old(history: History) -> str:
    client = _client(history, GRACE_)
    client.records = client.records[:-2]
    client.cursors[1] = history.final[0].last_seq
    return "unseen"


def start_everybody_over(history: History) -> str:
    answer = answers(history, MEMBER)[-1]
    answer.recovered, answer.changes = False, []
    return "needless-reset"


def lose_what_is_new(history: History) -> str:
    room = history.final[0]
    room.messages = [row for row in room.messages if row.client_id != "new 2"]
    return "lost-write"


def lose_what_the_copy_held(history: History) -> str:
    room = history.final[0]
    room.messages = [row for row in room.messages if row.client_id != "kept"]
    return "lost-write"


def acknowledge_into_the_old(history: History) -> str:
    """A server that writes into a file that is gone, long after it should have noticed."""
    _post(history, "gone 1").invoked = history.past[0].until + 1
    return "lost-write"


def give_a_wrong_mark(history: History) -> str:
    heard(history)[-1].seen.mark = "another"
    return "inconsistent-seq"


def leave_a_hole_in_the_old(history: History) -> str:
    del history.past[0].held[0].log[2]
    return "seq-hole"


def hear_what_is_in_no_history(history: History) -> str:
    heard(history)[3].seen.client_id = "nobody's"
    return "inconsistent-seq"


GOING_BACK = [
    resume_by_number, resume_from_beyond_the_head, drop_what_is_numbered_again, leave_somebody_in_the_old,
    start_everybody_over, lose_what_is_new, lose_what_the_copy_held, acknowledge_into_the_old,
    give_a_wrong_mark, leave_a_hole_in_the_old, hear_what_is_in_no_history,
]  # fmt: skip


@pytest.mark.parametrize("plant", GOING_BACK, ids=lambda plant: plant.__name__)
def test_what_is_planted_into_a_history_that_goes_back_is_found(plant: Callable[[History], str]) -> None:
    history = gone_back().end()
    expected = plant(history)
    verdict = check(history)
    assert verdict.valid is False
    assert expected in names(verdict)


def test_who_stays_and_is_not_told_is_seen() -> None:
    verdict = check(gone_back(told=False).end())
    assert "moved-silently" in names(verdict)


def test_a_mere_number_is_not_protected_but_who_stays_is_told_all_the_same() -> None:
    history = gone_back(proves=False).end()
    resume_by_number(history)
    assert check(history).valid
    drop_what_is_numbered_again(history)
    assert "moved-silently" in names(check(history))


def test_a_room_that_lost_nothing_starts_nobody_over() -> None:
    world = World()
    for user in (ADA, GRACE_):
        world.come(user)
    world.post("kept")
    world.go_back(world.copy())
    world._answer(ADA, 1, asked=False)
    answers(history := world.end(), ADA)[-1].recovered = False
    assert "needless-reset" in names(check(history))


@pytest.mark.parametrize("asked", [True, False])
def test_who_goes_by_the_timeline_starts_over_after_a_failover_when_it_comes_back(asked: bool) -> None:
    """But one that stays connected need not: the server knows what it has."""
    world = World()
    world.come(ADA)
    world.post("kept")
    world._answer(ADA, 1, asked=asked)
    history = world.end()
    answers(history, ADA)[-1].recovered = False
    assert "needless-reset" in names(check(history))
    next(client for client in history.clients if client.user == ADA).follows_timeline = True
    assert ("needless-reset" in names(check(history))) != asked


def test_a_removal_that_the_database_forgot_is_no_leak() -> None:
    world = World()
    world.come(ADA)
    world.come(MEMBER)
    world.post("one")
    copy = world.copy()
    world.remove()
    world.post("two")
    world.go_back(copy)
    world.come(MEMBER)
    world.post("three")
    world.add()
    assert check(world.end()).anomalies == []


# What may happen, and is no anomaly.


def test_the_unknown_may_have_happened_or_not() -> None:
    world = plain()
    world.attempts.append(Attempt(Kind.POST, 1, ADA, "gone with the wind", 5, 6, Outcome.INFO))
    world.attempts.append(Attempt(Kind.EDIT, 1, ADA, "nor this", 7, 8, Outcome.INFO, id=3))
    assert check(world.end()).valid


def test_an_unanswered_post_may_happen_long_after() -> None:
    """Its first attempt is when it began: nothing that was answered since says where it belongs."""
    world = World()
    world.come(ADA)
    late = Attempt(Kind.POST, 1, ADA, "late", world.tick(), world.tick(), Outcome.INFO)
    world.post("early")
    world.post("late", Outcome.INFO, Outcome.OK)
    world.attempts.insert(0, late)
    assert check(world.end()).valid


def test_starting_over_excuses_a_jump() -> None:
    world = World()
    world.come(ADA)
    world.post("one")
    world.go(ADA)
    for number in range(310):
        world.post(str(number))
    world.clients[ADA].records += [
        Connected(world.tick()),
        Answered(world.now, 1, 1, False, 311, [world._seen(entry) for entry in world.room.log[-50:]]),
    ]
    world.clients[ADA].cursors[1] = 311
    world.live.add(ADA)
    world.post("after")
    assert check(world.end()).valid


def test_who_was_removed_may_hear_what_was_on_its_way() -> None:
    history = plain().end()
    removal = next(a for a in history.attempts if a.kind is Kind.REMOVE)
    three = _post(history, "three")
    three.invoked = removal.ended + GRACE - 0.01
    let_the_removed_hear_three(history)
    assert "leak" not in names(check(history))


def let_the_removed_hear_three(history: History) -> None:
    three = next(record for record in heard(history) if record.seen.body == "three")
    records = _client(history, MEMBER).records
    gone = next(number for number, record in enumerate(records) if isinstance(record, Unsubscribed))
    records.insert(gone, deepcopy(three))


def test_an_unanswered_return_ends_the_judgement() -> None:
    """It may have happened at any time since: who hears something may be a member again."""
    history = plain().end()
    let_the_removed_hear(history)
    removal = next(a for a in history.attempts if a.kind is Kind.REMOVE)
    again = Attempt(Kind.ADD, 1, MEMBER, "add", removal.ended, removal.ended + 0.1, Outcome.INFO)
    history.attempts.append(again)
    assert "leak" not in names(check(history))


def test_a_member_that_stays_removed_need_not_have_everything() -> None:
    world = plain()
    world.remove()
    world.post("without them")
    assert check(world.end()).valid


def test_without_an_acknowledgement_nothing_is_known() -> None:
    world = World()
    world.post("one", Outcome.INFO)
    assert check(world.end()).valid is None
    history = plain().end()
    history.final = []
    assert check(history).valid is not True


# At random.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["post", "retry", "edit", "delete", "come", "go", "remove", "add", "copy", "go back"]),
        st.integers(0, 9),
    ),
    min_size=5,
    max_size=60,
)


def play(steps: list[tuple[str, int]]) -> World:
    world = World()
    world.come(ADA)
    world.post("first")
    copies = [world.copy()]
    for number, (step, choice) in enumerate(steps):
        # A backend whose database went back has forgotten what it posted before.
        known = [row for row in world.room.messages if row.seq > world.began_with]
        readable = [row for row in known if row.content is not None]
        user = (ADA, GRACE_, MEMBER)[choice % 3]
        match step:
            case "post":
                world.post(f"{number}")
            case "retry":
                world.post(f"{number}", *[Outcome.INFO] * (choice % 3), Outcome.OK)
            case "edit" if readable:
                world.edit(readable[choice % len(readable)], f"{number} edited")
            case "delete" if len(readable) > 1:
                world.delete(readable[choice % len(readable)])
            case "come" if user not in world.live:
                world.come(user)
            case "go" if user in world.live:
                world.go(user)
            case "remove" if MEMBER not in world.removed:
                world.remove()
            case "add":
                world.add()
            case "copy":
                copies.append(world.copy())
            case "go back":
                world.go_back(copies[choice % len(copies)])
    return world


@settings(deadline=None)
@given(STEPS)
def test_whatever_a_right_chat_does_is_valid(steps: list[tuple[str, int]]) -> None:
    verdict = check(play(steps).end())
    assert verdict.anomalies == []
    assert verdict.valid


@settings(deadline=None)
@given(STEPS, st.integers(1, 4), st.integers(0, 8), st.booleans())
def test_who_is_moved_to_another_history_and_not_told_is_always_seen(
    steps: list[tuple[str, int]], gone: int, new: int, stays: bool
) -> None:
    world = play(steps)
    if ADA not in world.live:
        world.come(ADA)
    copy = world.copy()
    for number in range(gone):
        world.post(f"gone {number}")
    if not stays:
        world.go(ADA)
    world.go_back(copy, told=False)
    world.knows = lambda user, after: after <= world.room.last_seq  # type: ignore[method-assign]
    for number in range(gone + new if not stays else new):
        world.post(f"new {number}")
    verdict = check(world.end())
    assert verdict.valid is False
    assert names(verdict) & {"moved-silently", "unseen"}


MUTATIONS = ("drop", "double", "swap", "forget a row", "another ack", "drop from the log")


@settings(deadline=None)
@given(STEPS, st.sampled_from(MUTATIONS), st.randoms(use_true_random=False))
def test_one_wrong_step_is_always_seen(
    steps: list[tuple[str, int]], mutation: str, dice: random.Random
) -> None:
    world = play(steps)
    world.post("last but one")
    world.post("last")
    history = world.end()
    records = _client(history, ADA).records
    # What was dropped just before she had to start over, nobody can know.
    told = [n for n, r in enumerate(records) if isinstance(r, Answered) and not r.recovered]
    places = [n for n, r in enumerate(records) if isinstance(r, Heard) and n > max(told, default=0)]
    # Somebody heard the last two: ADA, unless she was away; then there is nothing of hers to spoil.
    if mutation in ("drop", "double", "swap") and len(places) < 2:
        return
    match mutation:
        case "drop":
            del records[dice.choice(places)]
        case "double":
            place = dice.choice(places)
            records.insert(place, deepcopy(records[place]))
        case "swap":
            one, other = dice.sample(places, 2)
            records[one], records[other] = records[other], records[one]
        case "forget a row":
            room = history.final[0]
            acked = {a.id for a in history.attempts if a.kind is Kind.POST and a.outcome is Outcome.OK}
            room.messages.remove(dice.choice([row for row in room.messages if row.id in acked]))
        case "another ack":
            dice.choice([a for a in history.attempts if a.outcome is Outcome.OK and a.id]).seq += 1
        case "drop from the log":
            history.final[0].log.remove(dice.choice(history.final[0].log))
    assert check(history).valid is False


def test_a_wrong_picture_of_who_is_online_is_seen() -> None:
    def judged(*pictures: Picture) -> Verdict:
        history = plain().end()
        history.pictures = list(pictures)
        return check(history)

    right = Picture(5.0, "the backend", [1, 2], [1, 2])
    assert judged(right).counts["wrong-presence"] == 0
    for seen in ([1], [1, 2, 3], []):
        wrong = Picture(6.0, "client 3", seen, [1, 2])
        assert judged(right, wrong).counts["wrong-presence"] == 1
