"""What a history must not show, in the manner of Jepsen: pure, and knowing nothing of chatd but its promises.

    lost-write, ack-disagrees, duplicate-write, failed-visible, phantom     requests against the database
    duplicate-seq, seq-hole                                                 the log of a conversation
    realtime-order                                                          who was answered first comes first
    skip, duplicate-receive, nonmonotonic-receive, moved-silently,
    needless-reset                                                          what one client was given
    delivered-not-durable, inconsistent-seq                                 what all were given
    leak                                                                    who may not hear it
    wrong-presence                                                          who shows online and is not
    unseen                                                                  who has not everything in the end

A request without an answer is *unknown*: it may have happened, or not, or happen yet. None of these takes it
for a failure. Where the database went back in time (`Past`), what was acknowledged before and is gone was lost
with the database: it is counted and is no anomaly. Each history must be sound by itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from msgspec import Struct

from tests.faults.facts import Facts, Operation, Truth
from tests.faults.history import (
    Answered,
    Attempt,
    Client,
    Connected,
    Conversation,
    Heard,
    History,
    Kind,
    Outcome,
    Seen,
)
from tests.faults.readers import Anomaly, Reader

GRACE = 1.0  # seconds that a removal has to take effect (G6)


class Verdict(Struct):
    """`valid` is None where nothing can be said: nothing was acknowledged, or there is no final read."""

    valid: bool | None
    anomalies: list[Anomaly]
    acknowledged: int = 0
    unknown: int = 0
    failed: int = 0
    received: int = 0
    connections: int = 0
    resumed: int = 0
    started_over: int = 0
    removed: int = 0  # members
    gone: list[float] = []  # when each was acknowledged that was lost with the database as it went back

    @property
    def counts(self) -> Counter[str]:
        return Counter(anomaly.name for anomaly in self.anomalies)


def check(history: History) -> Verdict:
    facts = Facts(history)
    readers = [Reader(facts, client) for client in history.clients]
    found = [
        *writes(facts),
        *logs(facts),
        *real_time(facts),
        *(anomaly for reader in readers for anomaly in reader.anomalies),
        *deliveries(facts),
        *leaks(facts),
        *convergence(facts, readers),
        *wrong_pictures(history),
    ]
    outcomes = Counter(attempt.outcome for attempt in history.attempts)
    verdict = Verdict(
        not found if outcomes[Outcome.OK] and history.final else None,
        sorted(found, key=lambda anomaly: anomaly.at),
        acknowledged=outcomes[Outcome.OK],
        unknown=outcomes[Outcome.INFO],
        failed=outcomes[Outcome.FAIL],
        removed=sum(a.kind is Kind.REMOVE and a.outcome is Outcome.OK for a in history.attempts),
    )
    verdict.gone = [ack.ended for op in facts.operations for ack in op.acks if _gone(facts, op, ack)]
    for client in history.clients:
        _count(client, verdict)
    return verdict


def wrong_pictures(history: History) -> Iterator[Anomaly]:
    """Who shows online and is not, or is connected and does not show, long enough after a fault."""
    for one in history.pictures:
        if one.seen != one.true:
            what = f"{one.whose} sees {one.seen}, and connected are {one.true}"
            yield Anomaly("wrong-presence", 0, one.at, what)


def _gone(facts: Facts, op: Operation, ack: Attempt) -> bool:
    return op.kind not in (Kind.ADD, Kind.REMOVE) and facts.home(op, ack) not in (None, facts.final)


def _count(client: Client, verdict: Verdict) -> None:
    for record in client.records:
        match record:
            case Heard():
                verdict.received += 1
            case Connected():
                verdict.connections += 1
            case Answered(recovered=False):
                verdict.started_over += 1
            case Answered(changes=changes) if changes:
                verdict.received += len(changes)
                verdict.resumed += 1


# Requests against the database.


def writes(facts: Facts) -> Iterator[Anomaly]:
    for op in facts.operations:
        for ack in op.acks:
            if op.kind is Kind.POST and facts.home(op, ack) is None:
                yield _missing_post(facts, op, ack)
            elif op.kind in (Kind.EDIT, Kind.DELETE) and facts.home(op, ack) is None:
                yield Anomaly(
                    "lost-write", op.conversation, ack.ended,
                    f"{op.body!r} was acknowledged as seq {ack.seq}; the log has"
                    f" {facts.final.log.get((op.conversation, ack.seq))} there",
                )  # fmt: skip
    yield from _copies(facts)
    yield from _two_answers(facts)
    yield from _shared(facts)
    seen: set[tuple[str, str]] = set()
    for truth in reversed(facts.truths):
        for conversation in truth.conversations.values():
            for anomaly in _rows(facts, truth, conversation):
                if (anomaly.name, anomaly.sentence) not in seen:  # histories begin alike
                    seen.add((anomaly.name, anomaly.sentence))
                    yield anomaly


def _copies(facts: Facts) -> Iterator[Anomaly]:
    """Where the database went back, it still has everything that the copy held."""
    for past, after in zip(facts.history.past, facts.truths[1:], strict=True):
        copy = Truth(0, past.copy, past.until)
        for place, conversation in copy.conversations.items():
            for entry in conversation.log:
                if copy.change(place, entry.seq) != after.change(place, entry.seq):
                    yield Anomaly(
                        "lost-write", place, past.until,
                        f"the copy held seq {entry.seq} as {copy.change(place, entry.seq)},"
                        f" what followed has {after.change(place, entry.seq)} there",
                    )  # fmt: skip


def _missing_post(facts: Facts, op: Operation, ack: Attempt) -> Anomaly:
    row = facts.final.rows.get(ack.id)
    what = f"{op.body!r} was acknowledged as id {ack.id}, seq {ack.seq}"
    if row is None or row.client_id != op.body or facts.final.place[ack.id] != op.conversation:
        return Anomaly("lost-write", op.conversation, ack.ended, f"{what}; the database has it not")
    return Anomaly("ack-disagrees", op.conversation, ack.ended, f"{what}; the database has it as {row.seq}")


def _two_answers(facts: Facts) -> Iterator[Anomaly]:
    """One post was acknowledged twice, as two different messages of one history."""
    for op in facts.operations:
        if op.kind is Kind.POST and len(op.acks) > 1:
            homes = {(ack.id, ack.seq): facts.home(op, ack) for ack in op.acks}
            if len(homes) > len(set(map(id, homes.values()))):
                yield Anomaly(
                    "ack-disagrees", op.conversation, op.acks[-1].ended,
                    f"{op.body!r} was acknowledged as {[(ack.id, ack.seq) for ack in op.acks]}",
                )  # fmt: skip


def _shared(facts: Facts) -> Iterator[Anomaly]:
    """Two requests cannot have been the same change of one history."""
    owners: dict[tuple[int, int, int], Operation] = {}
    for op in facts.operations:
        for ack in op.acks:
            home = facts.home(op, ack) or facts.final
            owner = owners.setdefault((home.bit, op.conversation, ack.seq), op)
            if ack.seq and owner is not op:
                yield Anomaly(
                    "ack-disagrees", op.conversation, ack.ended,
                    f"{op.body!r} was acknowledged as seq {ack.seq}, as {owner.body!r} was",
                )  # fmt: skip


def _rows(facts: Facts, truth: Truth, conversation: Conversation) -> Iterator[Anomaly]:
    keys = Counter((row.user, row.client_id) for row in conversation.messages if row.client_id is not None)
    for row in conversation.messages:
        at = min(truth.until, facts.history.settled)
        op = facts.posts.get(row.client_id or "")
        if row.client_id is not None and keys[row.user, row.client_id] > 1:
            yield Anomaly(
                "duplicate-write", conversation.id, op.began if op else at,
                f"{row.client_id!r} is stored {keys[row.user, row.client_id]} times, as id {row.id} too",
            )  # fmt: skip
        if op is None or op.conversation != conversation.id or op.user != row.user:
            yield Anomaly("phantom", conversation.id, at, f"nobody asked for id {row.id}, {row.content!r}")
        elif op.refused:
            yield Anomaly("failed-visible", conversation.id, at, f"{op.body!r} was refused, and is id {row.id}")


def logs(facts: Facts) -> Iterator[Anomaly]:
    for truth in facts.truths:
        at = min(truth.until, facts.history.settled)
        for conversation in truth.conversations.values():
            yield from _log(conversation, at)


def _log(conversation: Conversation, at: float) -> Iterator[Anomaly]:
    seqs = Counter(entry.seq for entry in conversation.log)
    for seq, times in seqs.items():
        if times > 1:
            yield Anomaly("duplicate-seq", conversation.id, at, f"seq {seq} is in the log {times} times")
    holes = set(range(1, conversation.last_seq + 1)) ^ seqs.keys()
    if holes:
        yield Anomaly(
            "seq-hole", conversation.id, at,
            f"the log of 1 to {conversation.last_seq} has no or a wrong seq {sorted(holes)[:10]}",
        )  # fmt: skip


# Order.


def real_time(facts: Facts) -> Iterator[Anomaly]:
    """What was answered before another was asked for has the lower seq, in the same history."""
    for truth in facts.truths:
        for conversation, events in _events(facts, truth).items():
            yield from _out_of_order(conversation, events)


def _events(facts: Facts, truth: Truth) -> dict[int, list[tuple[float, int, int, str]]]:
    """By conversation: (when, whether it is a beginning, seq, body)"""
    found: dict[int, list[tuple[float, int, int, str]]] = defaultdict(list)
    rows = {row.client_id: row for row in truth.rows.values() if row.client_id is not None}
    for op in facts.operations:
        acks = [ack for ack in op.acks if facts.home(op, ack) in (None, truth) or truth.holds(op, ack)]
        if op.kind is Kind.POST and op.body in rows:
            seq = rows[op.body].seq
        elif op.kind in (Kind.EDIT, Kind.DELETE) and acks:
            seq = acks[0].seq
        else:
            continue
        found[op.conversation].append((op.began, 1, seq, op.body))
        if acks:
            found[op.conversation].append((min(ack.ended for ack in acks), 0, seq, op.body))
    return found


def _out_of_order(conversation: int, events: list[tuple[float, int, int, str]]) -> Iterator[Anomaly]:
    highest, whose = 0, ""
    for at, begins, seq, body in sorted(events, key=lambda event: (event[0], -event[1])):
        if begins and seq < highest:
            yield Anomaly(
                "realtime-order", conversation, at,
                f"{body!r} was asked for after {whose!r} had been answered as seq {highest}, and is {seq}",
            )  # fmt: skip
        elif not begins and seq > highest:
            highest, whose = seq, body


# What all were given.


def _given(client: Client) -> Iterator[tuple[float, int, Seen, bool]]:
    """(at, conversation, seen, whether its seq is one of the log)"""
    for record in client.records:
        if isinstance(record, Heard):
            yield record.at, record.conversation, record.seen, True
        elif isinstance(record, Answered):
            for seen in record.changes:
                yield record.at, record.conversation, seen, record.recovered


def deliveries(facts: Facts) -> Iterator[Anomaly]:
    judged: set[tuple[object, ...]] = set()
    for client in facts.history.clients:
        for at, place, seen, logged in _given(client):
            key = (place, seen.seq, seen.id, seen.event, seen.body, seen.client_id, seen.mark, logged)
            if key not in judged:
                judged.add(key)
                if not facts.holding(place, seen, logged=logged):
                    yield _wrong(facts.final, client, at, place, seen, logged)


def _wrong(truth: Truth, client: Client, at: float, place: int, seen: Seen, logged: bool) -> Anomaly:
    """Why no history has it, as the last one shows it."""
    what = f"{client.name} was given seq {seen.seq} as {seen.event} of id {seen.id}, {seen.body!r}"
    entry = truth.log.get((place, seen.seq))
    if truth.place.get(seen.id) != place or (logged and entry is None):
        return Anomaly("delivered-not-durable", place, at, f"{what}; the database has no such thing")
    if logged and entry == (seen.event, seen.id) and seen.body not in truth.bodies[seen.id]:
        return Anomaly("inconsistent-seq", place, at, f"{what}; it never said that")
    where = f"{truth.change(place, seen.seq)}, and the message is {truth.rows[seen.id]}"
    return Anomaly("inconsistent-seq", place, at, f"{what}, mark {seen.mark}; the log has {where}")


# Who may not hear it.


def leaks(facts: Facts) -> Iterator[Anomaly]:
    absences = _absences(facts)
    for client in facts.history.clients:
        for at, place, seen, _ in _given(client):
            if client.outsider:
                yield Anomaly("leak", place, at, f"{client.name}, an outsider, was given seq {seen.seq}")
                continue
            for gone, back in absences.get((place, client.user), ()):
                row = facts.row(place, seen)
                op = facts.posts.get((row.client_id if row else None) or "")
                if gone + GRACE < at < back and op is not None and op.began > gone + GRACE:
                    late = f"asked for {op.began - gone:.2f} s after its removal"
                    yield Anomaly("leak", place, at, f"{client.name} was given seq {seen.seq}, {late}")
        if client.outsider:
            for record in client.records:
                if isinstance(record, Answered):
                    yield Anomaly(
                        "leak", record.conversation, record.at, f"{client.name}, an outsider, was let in"
                    )


def _absences(facts: Facts) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """By (conversation, user): from a removal that was answered to the next that could undo it, or until the
    database went back and may have forgotten it.
    """
    found: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    changes: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    for attempt in facts.history.attempts:
        if attempt.kind in (Kind.ADD, Kind.REMOVE):
            changes[attempt.conversation, attempt.user].append(attempt)
    for key, attempts in changes.items():
        attempts.sort(key=lambda attempt: attempt.invoked)
        for number, attempt in enumerate(attempts):
            if attempt.kind is Kind.ADD and attempt.outcome is Outcome.INFO:
                break  # it may happen at any time from now on
            if attempt.kind is Kind.REMOVE and attempt.outcome is Outcome.OK:
                later = [other.invoked for other in attempts[number:] if other.kind is Kind.ADD]
                later += [past.at for past in facts.history.past if attempt.invoked <= past.until]
                found[key].append((attempt.ended, min(later, default=float("inf"))))
    return found


# Who has not everything in the end.


def convergence(facts: Facts, readers: Sequence[Reader]) -> Iterator[Anomaly]:
    outside, at = _outside(facts), facts.history.settled
    for reader in readers:
        client = reader.client
        if client.outsider:
            continue
        for place in client.cursors:
            if (place, client.user) in outside:
                continue
            head, reached = facts.final.head(place), reader.reached(place)
            if reached < head:
                what = f"{client.name} has {reached} of {head} when all is quiet"
                yield Anomaly("unseen", place, at, what)
            elif not reader.current(place):
                what = f"{client.name} has {reached} of a history that is gone, when all is quiet"
                yield Anomaly("unseen", place, at, what)


def _outside(facts: Facts) -> set[tuple[int, int]]:
    """Who is removed in the end, or may be."""
    last: dict[tuple[int, int], Attempt] = {}
    for attempt in sorted(facts.history.attempts, key=lambda attempt: attempt.invoked):
        if attempt.kind in (Kind.ADD, Kind.REMOVE):
            last[attempt.conversation, attempt.user] = attempt
    forgotten = max((past.until for past in facts.history.past), default=0.0)
    return {
        key
        for key, attempt in last.items()
        if attempt.kind is Kind.REMOVE or attempt.outcome is not Outcome.OK or attempt.invoked <= forgotten
    }
