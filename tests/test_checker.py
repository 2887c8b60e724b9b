"""The checker sees what it is for, and takes nothing that may happen for a mistake."""

from __future__ import annotations

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
    Seen,
    Stored,
    Unsubscribed,
)

ADA, GRACE_, MEMBER, OUTSIDER = 1, 2, 3, 4
EVENTS = {"created": "message", "edited": "message.updated", "deleted": "message.deleted"}


class World:
    """A chat that does everything right, one step after the other; each step takes a second."""

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
        self.attempts.append(Attempt(kind, 1, ADA, body, began, ended, Outcome.OK, row.id, seq))
        self._log(logged, row)

    def _log(self, kind: str, row: Stored) -> None:
        self.room.last_seq += 1
        entry = Logged(self.room.last_seq, kind, row.id)
        self.room.log.append(entry)
        for user in sorted(self.live):
            self.clients[user].records.append(Heard(self.now, 1, self._seen(entry)))
            self.clients[user].cursors[1] = entry.seq

    def _seen(self, entry: Logged) -> Seen:
        row = self.room.messages[entry.id - 1]
        return Seen(entry.seq, entry.id, EVENTS[entry.kind], row.content)

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
        after = client.cursors.get(1)
        missed = [] if after is None else [self._seen(entry) for entry in self.room.log[after:]]
        client.records.append(Answered(self.now, 1, after, True, self.room.last_seq, missed))
        client.cursors[1] = self.room.last_seq
        self.live.add(user)

    def go(self, user: int) -> None:
        self.clients[user].records.append(Disconnected(self.tick(), 0))
        self.live.discard(user)

    def end(self) -> History:
        for user in sorted({ADA, GRACE_, MEMBER} - self.live - self.removed):
            self.come(user)
        return History(self.attempts, list(self.clients.values()), [self.room], self.tick())


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
        st.sampled_from(["post", "retry", "edit", "delete", "come", "go", "remove", "add"]), st.integers(0, 9)
    ),
    min_size=5,
    max_size=60,
)


def play(steps: list[tuple[str, int]]) -> World:
    world = World()
    world.come(ADA)
    world.post("first")
    for number, (step, choice) in enumerate(steps):
        readable = [row for row in world.room.messages if row.content is not None]
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
    return world


@settings(deadline=None)
@given(STEPS)
def test_whatever_a_right_chat_does_is_valid(steps: list[tuple[str, int]]) -> None:
    verdict = check(play(steps).end())
    assert verdict.anomalies == []
    assert verdict.valid


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
    places = [n for n, record in enumerate(records) if isinstance(record, Heard)]
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
