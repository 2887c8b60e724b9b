"""A history, looked up from all sides.

The database may have gone back in time, once or more often. Then there is more than one *truth*: what it held
each time when it went back, and what it holds in the end. They agree up to where the copy was taken. A set of
truths is an integer here, with one bit for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tests.faults.history import (
    Answered,
    Attempt,
    Conversation,
    History,
    Kind,
    Outcome,
    Seen,
    Stored,
)

EVENTS = {"created": "message", "edited": "message.updated", "deleted": "message.deleted"}


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


class Truth:
    """What the database held at one time. `until`: whoever asked later was answered from the next one."""

    def __init__(self, number: int, held: Sequence[Conversation], until: float) -> None:
        self.bit, self.until = 1 << number, until
        self.conversations = {conversation.id: conversation for conversation in held}
        self.rows = {row.id: row for place in held for row in place.messages}
        self.place = {row.id: place.id for place in held for row in place.messages}
        self.log = {
            (place.id, entry.seq): (EVENTS[entry.kind], entry.id) for place in held for entry in place.log
        }
        self.marks = {(place.id, entry.seq): entry.mark for place in held for entry in place.log}
        self.bodies: dict[int, set[str | None]] = defaultdict(set)  # everything that a message may have said

    def head(self, place: int) -> int:
        return self.conversations[place].last_seq if place in self.conversations else 0

    def change(self, place: int, seq: int) -> tuple[object, ...] | None:
        """What tells a change of this history from any of another."""
        if (entry := self.log.get((place, seq))) is None:
            return None
        row = self.rows.get(entry[1])
        return (*entry, row and row.client_id, self.marks[place, seq])

    def holds(self, op: Operation, ack: Attempt) -> bool:
        """Whether it has what was acknowledged, under the same numbers."""
        if op.kind is Kind.POST:
            row = self.rows.get(ack.id)
            named = row is not None and row.client_id == op.body and self.place[ack.id] == op.conversation
            return named and row is not None and row.seq == ack.seq
        if ack.of and (ack.id not in self.rows or self.rows[ack.id].client_id != ack.of):
            return False
        event = "message.updated" if op.kind is Kind.EDIT else "message.deleted"
        return self.log.get((op.conversation, ack.seq)) == (event, ack.id)

    def has(self, place: int, seen: Seen, *, logged: bool) -> bool:
        """Whether a client may have been given this from it. `logged`: its seq is one of the log."""
        row = self.rows.get(seen.id)
        if row is None or self.place[seen.id] != place or seen.body not in self.bodies[seen.id]:
            return False
        if seen.client_id is not None and seen.client_id != row.client_id:
            return False
        if not logged:
            return row.seq == seen.seq
        return self.log.get((place, seen.seq)) == (seen.event, seen.id) and self.marked(
            place, seen.seq, seen.mark
        )

    def marked(self, place: int, seq: int, mark: str | None) -> bool:
        """Whether `seq` may have borne the mark; one that is not known may be any."""
        known = self.marks.get((place, seq))
        return mark is None or known is None or known == mark

    def reaches(self, answer: Answered) -> bool:
        """Whether the room can have stood there."""
        if answer.seq == 0:
            return True
        if answer.seq > self.head(answer.conversation):
            return False
        return self.marked(answer.conversation, answer.seq, answer.mark)


class Facts:
    def __init__(self, history: History) -> None:
        self.history = history
        self.operations = _operations(history.attempts)
        self.posts = {op.body: op for op in self.operations if op.kind is Kind.POST}
        ends = [*((past.held, past.until) for past in history.past), (history.final, float("inf"))]
        self.truths = [Truth(number, held, until) for number, (held, until) in enumerate(ends)]
        self.final = self.truths[-1]
        self.any = (1 << len(self.truths)) - 1
        for truth in self.truths:
            self._collect_bodies(truth)
        self._holding: dict[tuple[int, int, int, str, str | None, str | None, str | None, bool], int] = {}

    def _collect_bodies(self, truth: Truth) -> None:
        for op in self.operations:
            for attempt in op.attempts:
                if op.kind is Kind.EDIT:
                    truth.bodies[attempt.id].add(op.body)
                elif op.kind is Kind.DELETE:
                    truth.bodies[attempt.id].add(None)
        for row in truth.rows.values():
            if row.client_id is not None:
                truth.bodies[row.id].add(row.client_id)  # a post's body is its client_id
            if row.content is None:
                truth.bodies[row.id].add(None)

    def home(self, op: Operation, ack: Attempt) -> Truth | None:
        """The last truth that holds what was acknowledged, and could when it was asked for."""
        for truth in reversed(self.truths):
            if truth.holds(op, ack):
                return truth if ack.invoked <= truth.until else None
        return None

    def holding(self, place: int, seen: Seen, *, logged: bool = True) -> int:
        """The truths that a client may have been given this from."""
        key = (place, seen.seq, seen.id, seen.event, seen.body, seen.client_id, seen.mark, logged)
        if key not in self._holding:
            self._holding[key] = sum(t.bit for t in self.truths if t.has(place, seen, logged=logged))
        return self._holding[key]

    def answering(self, answer: Answered) -> int:
        """The truths that an answer can have been read from."""
        found = sum(truth.bit for truth in self.truths if truth.reaches(answer))
        for seen in answer.changes:
            found &= self.holding(answer.conversation, seen, logged=answer.recovered)
        return found

    def row(self, place: int, seen: Seen) -> Stored | None:
        """The row of a message, from the last truth that has this of it."""
        for truth in reversed(self.truths):
            if truth.has(place, seen, logged=True) or truth.has(place, seen, logged=False):
                return truth.rows[seen.id]
        return self.final.rows.get(seen.id)


def _operations(attempts: Sequence[Attempt]) -> list[Operation]:
    grouped: dict[tuple[Kind, int, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        grouped[attempt.kind, attempt.conversation, attempt.body].append(attempt)
    return [Operation(sorted(group, key=lambda attempt: attempt.invoked)) for group in grouped.values()]
