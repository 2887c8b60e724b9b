"""What a history must not show, in the manner of Jepsen: pure, and knowing nothing of chatd but its promises.

    lost-write, ack-disagrees, duplicate-write, failed-visible, phantom     requests against the database
    duplicate-seq, seq-hole                                                 the log of a conversation
    realtime-order                                                          who was answered first comes first
    skip, duplicate-receive, nonmonotonic-receive, needless-reset           what one client was given
    delivered-not-durable, inconsistent-seq                                 what all were given
    leak                                                                    who may not hear it
    unseen                                                                  who has not everything in the end

A request without an answer is *unknown*: it may have happened, or not, or happen yet. None of these takes it
for a failure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from msgspec import Struct

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
    Stored,
    Unsubscribed,
)

GRACE = 1.0  # seconds that a removal has to take effect (G6)
REPLAY_CHANGES = 300  # missed changes that are always made up for
REPLAY_BYTES = 200 * 1024  # of one room, and
READY_BYTES = 400 * 1024  # of all rooms of one answer: below the protocol's bounds, for we only guess the bytes
CHANGE_BYTES = 250  # of a change without its content
EVENTS = {"created": "message", "edited": "message.updated", "deleted": "message.deleted"}


class Anomaly(Struct):
    """`at` is when it shows, on the clock of the history."""

    name: str
    conversation: int
    at: float
    sentence: str


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
    for client in history.clients:
        _count(client, verdict)
    return verdict


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


class Operation:
    """All attempts of one request. `began` is the first: from then on it may have happened."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.attempts = attempts
        first = attempts[0]
        self.kind, self.conversation, self.user, self.body = (
            first.kind,
            first.conversation,
            first.user,
            first.body,
        )
        self.began = min(attempt.invoked for attempt in attempts)
        self.acks = [attempt for attempt in attempts if attempt.outcome is Outcome.OK]
        self.acknowledged = min((attempt.ended for attempt in self.acks), default=None)
        self.refused = all(attempt.outcome is Outcome.FAIL for attempt in attempts)


class Facts:
    """A history, looked up from all sides."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.operations = _operations(history.attempts)
        self.conversations = {conversation.id: conversation for conversation in history.final}
        self.posts = {op.body: op for op in self.operations if op.kind is Kind.POST}
        self.rows = {row.id: row for place in history.final for row in place.messages}
        self.place = {row.id: place.id for place in history.final for row in place.messages}
        self.log = {
            (place.id, entry.seq): (EVENTS[entry.kind], entry.id)
            for place in history.final
            for entry in place.log
        }
        # Everything that a message may ever have said.
        self.bodies: dict[int, set[str | None]] = defaultdict(set)
        for op in self.operations:
            for attempt in op.attempts:
                if op.kind is Kind.EDIT:
                    self.bodies[attempt.id].add(op.body)
                elif op.kind is Kind.DELETE:
                    self.bodies[attempt.id].add(None)
        for row in self.rows.values():
            if row.client_id is not None:
                self.bodies[row.id].add(row.client_id)  # a post's body is its client_id
            if row.content is None:
                self.bodies[row.id].add(None)


def _operations(attempts: Sequence[Attempt]) -> list[Operation]:
    grouped: dict[tuple[Kind, int, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        grouped[attempt.kind, attempt.conversation, attempt.body].append(attempt)
    return [Operation(sorted(group, key=lambda attempt: attempt.invoked)) for group in grouped.values()]


# Requests against the database.


def writes(facts: Facts) -> Iterator[Anomaly]:
    for op in facts.operations:
        if op.kind is Kind.POST:
            yield from _post(facts, op)
        elif op.kind in (Kind.EDIT, Kind.DELETE):
            yield from _change(facts, op)
    yield from _shared(facts)
    for conversation in facts.conversations.values():
        yield from _rows(facts, conversation)


def _shared(facts: Facts) -> Iterator[Anomaly]:
    """Two requests cannot have been the same change."""
    owners: dict[tuple[int, int], Operation] = {}
    for op in facts.operations:
        for ack in op.acks:
            owner = owners.setdefault((op.conversation, ack.seq), op)
            if ack.seq and owner is not op:
                yield Anomaly(
                    "ack-disagrees", op.conversation, ack.ended,
                    f"{op.body!r} was acknowledged as seq {ack.seq}, as {owner.body!r} was",
                )  # fmt: skip


def _post(facts: Facts, op: Operation) -> Iterator[Anomaly]:
    for ack in op.acks:
        row = facts.rows.get(ack.id)
        if row is None or row.client_id != op.body or facts.place[ack.id] != op.conversation:
            yield Anomaly(
                "lost-write", op.conversation, ack.ended,
                f"{op.body!r} was acknowledged as id {ack.id}, seq {ack.seq}; the database has it not",
            )  # fmt: skip
        elif row.seq != ack.seq:
            yield Anomaly(
                "ack-disagrees", op.conversation, ack.ended,
                f"{op.body!r} was acknowledged as seq {ack.seq}; the database has it as {row.seq}",
            )  # fmt: skip
    if len({(ack.id, ack.seq) for ack in op.acks}) > 1:
        yield Anomaly(
            "ack-disagrees", op.conversation, op.acks[-1].ended,
            f"{op.body!r} was acknowledged as {[(ack.id, ack.seq) for ack in op.acks]}",
        )  # fmt: skip


def _change(facts: Facts, op: Operation) -> Iterator[Anomaly]:
    event = "message.updated" if op.kind is Kind.EDIT else "message.deleted"
    for ack in op.acks:
        if facts.log.get((op.conversation, ack.seq)) != (event, ack.id):
            yield Anomaly(
                "lost-write", op.conversation, ack.ended,
                f"{op.body!r} was acknowledged as seq {ack.seq}; the log has"
                f" {facts.log.get((op.conversation, ack.seq))} there",
            )  # fmt: skip


def _rows(facts: Facts, conversation: Conversation) -> Iterator[Anomaly]:
    times = {id: op.began for op in facts.posts.values() for id in (ack.id for ack in op.acks)}
    keys = Counter((row.user, row.client_id) for row in conversation.messages if row.client_id is not None)
    for row in conversation.messages:
        at = times.get(row.id, facts.history.settled)
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
    for conversation in facts.conversations.values():
        seqs = Counter(entry.seq for entry in conversation.log)
        at = facts.history.settled
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
    """What was answered before another was asked for has the lower seq."""
    by_place: dict[int, list[tuple[float, int, int, str]]] = defaultdict(list)
    rows = {row.client_id: row for row in facts.rows.values() if row.client_id is not None}
    for op in facts.operations:
        if op.kind is Kind.POST and op.body in rows:
            seq = rows[op.body].seq
        elif op.kind in (Kind.EDIT, Kind.DELETE) and op.acks:
            seq = op.acks[0].seq
        else:
            continue
        events = by_place[op.conversation]
        events.append((op.began, 1, seq, op.body))
        if op.acknowledged is not None:
            events.append((op.acknowledged, 0, seq, op.body))
    for conversation, events in by_place.items():
        highest, whose = 0, ""
        for at, begins, seq, body in sorted(events, key=lambda event: (event[0], -event[1])):
            if begins and seq < highest:
                yield Anomaly(
                    "realtime-order", conversation, at,
                    f"{body!r} was asked for after {whose!r} had been answered as seq {highest}, and is {seq}",
                )  # fmt: skip
            elif not begins and seq > highest:
                highest, whose = seq, body


# What one client was given.


class Reader:
    """One client, followed over all that it was given: where that leaves it, and what was wrong on the way."""

    def __init__(self, facts: Facts, client: Client) -> None:
        self._facts, self.client = facts, client
        self._cursors: dict[int, int] = {}
        self.anomalies = list(self._follow())

    def reached(self, place: int) -> int:
        """What it was given, whatever it takes itself to have."""
        return min(self._cursors.get(place, 0), self.client.cursors[place])

    def _follow(self) -> Iterator[Anomaly]:
        for record in self.client.records:
            match record:
                case Heard():
                    yield from self._heard(record)
                case Answered():
                    yield from self._answered(record)
                case Unsubscribed():
                    self._cursors.pop(record.conversation, None)

    def _heard(self, record: Heard) -> Iterator[Anomaly]:
        place, seq = record.conversation, record.seen.seq
        cursor = self._cursors.get(place)
        if cursor is None:
            yield self._anomaly("skip", record, f"was given seq {seq} before any answer")
        elif seq == cursor:
            yield self._anomaly("duplicate-receive", record, f"was given seq {seq} twice")
        elif seq < cursor:
            yield self._anomaly("nonmonotonic-receive", record, f"was given seq {seq} after {cursor}")
        elif seq > cursor + 1:
            yield self._anomaly("skip", record, f"was given seq {seq} after {cursor}")
        self._cursors[place] = max(seq, cursor or 0)

    def _answered(self, record: Answered) -> Iterator[Anomaly]:
        place, cursor = record.conversation, self._cursors.get(record.conversation)
        after = record.after if record.asked else cursor
        if record.asked and after is not None and after > (cursor or 0):
            yield self._anomaly("skip", record, f"has {after} and was given {cursor}")
        elif record.recovered and after is not None:
            got = [seen.seq for seen in record.changes]
            if got != list(range(after + 1, record.seq + 1)):
                yield self._anomaly(
                    "skip",
                    record,
                    f"asked for what comes after {after}, was told {record.seq} and given {got[:20]}",
                )
        elif not record.recovered and after is not None and self._needless(record, after):
            yield self._anomaly(
                "needless-reset", record, f"was at {after} of {record.seq} and told to start over"
            )
        self._cursors[place] = record.seq

    def _needless(self, record: Answered, after: int) -> bool:
        if not 0 <= after <= record.seq or record.seq - after > REPLAY_CHANGES:
            return False
        if self._missed_bytes(record) > REPLAY_BYTES:
            return False
        # What came in the same moment came in the same `ready`.
        together = (r for r in self.client.records if isinstance(r, Answered) and r.at == record.at)
        return sum(map(self._missed_bytes, together)) < READY_BYTES

    def _missed_bytes(self, record: Answered) -> int:
        if record.after is None:
            return 0
        missed = range(record.after + 1, record.seq + 1)
        ids = [self._facts.log.get((record.conversation, seq), ("", 0))[1] for seq in missed]
        longest = (max((len(body or "") for body in self._facts.bodies[id]), default=0) for id in ids)
        return sum(longest) + CHANGE_BYTES * len(ids)

    def _anomaly(self, name: str, record: Heard | Answered, what: str) -> Anomaly:
        return Anomaly(name, record.conversation, record.at, f"{self.client.name} {what}")


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
    judged: set[tuple[int, int, int, str, str | None, bool]] = set()
    for client in facts.history.clients:
        for at, place, seen, logged in _given(client):
            key = (place, seen.seq, seen.id, seen.event, seen.body, logged)
            if key not in judged:
                judged.add(key)
                yield from _delivery(facts, client, at, place, seen, logged)


def _delivery(
    facts: Facts, client: Client, at: float, place: int, seen: Seen, logged: bool
) -> Iterator[Anomaly]:
    what = f"{client.name} was given seq {seen.seq} as {seen.event} of id {seen.id}, {seen.body!r}"
    row: Stored | None = facts.rows.get(seen.id)
    truth = facts.log.get((place, seen.seq))
    if row is None or facts.place[seen.id] != place or (logged and truth is None):
        yield Anomaly("delivered-not-durable", place, at, f"{what}; the database has no such thing")
        return
    if (logged and truth != (seen.event, seen.id)) or (not logged and row.seq != seen.seq):
        yield Anomaly("inconsistent-seq", place, at, f"{what}; the log has {truth}")
    if seen.body not in facts.bodies[seen.id]:
        yield Anomaly("inconsistent-seq", place, at, f"{what}; it never said that")


# Who may not hear it.


def leaks(facts: Facts) -> Iterator[Anomaly]:
    absences = _absences(facts)
    for client in facts.history.clients:
        for at, place, seen, _ in _given(client):
            if client.outsider:
                yield Anomaly("leak", place, at, f"{client.name}, an outsider, was given seq {seen.seq}")
                continue
            for gone, back in absences.get((place, client.user), ()):
                row = facts.rows.get(seen.id)
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
    """By (conversation, user): from a removal that was answered to the next that could undo it."""
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
                found[key].append((attempt.ended, min(later, default=float("inf"))))
    return found


# Who has not everything in the end.


def convergence(facts: Facts, readers: Sequence[Reader]) -> Iterator[Anomaly]:
    outside = _outside(facts)
    for reader in readers:
        client = reader.client
        for place in client.cursors:
            conversation = facts.conversations.get(place)
            head = conversation.last_seq if conversation else 0
            reached = reader.reached(place)
            if not client.outsider and (place, client.user) not in outside and reached < head:
                what = f"{client.name} has {reached} of {head} when all is quiet"
                yield Anomaly("unseen", place, facts.history.settled, what)


def _outside(facts: Facts) -> set[tuple[int, int]]:
    """Who is removed in the end, or may be."""
    last: dict[tuple[int, int], Attempt] = {}
    for attempt in sorted(facts.history.attempts, key=lambda attempt: attempt.invoked):
        if attempt.kind in (Kind.ADD, Kind.REMOVE):
            last[attempt.conversation, attempt.user] = attempt
    return {
        key for key, attempt in last.items() if attempt.kind is Kind.REMOVE or attempt.outcome is not Outcome.OK
    }
