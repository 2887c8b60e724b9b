"""What one client was given: in each room a contiguous part of one history, since it last had to start over.

skip, duplicate-receive, nonmonotonic-receive    the order of the numbers
moved-silently                                   what it holds is of two histories, and it was not told
needless-reset                                   it was told to start over, and need not have been
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from tests.faults.facts import Facts
from tests.faults.history import Answered, Client, Heard, Unsubscribed

REPLAY_CHANGES = 300  # missed changes that are always made up for
REPLAY_BYTES = 200 * 1024  # of one room, and
READY_BYTES = 400 * 1024  # of all rooms of one answer: below the protocol's bounds, for we only guess the bytes
CHANGE_BYTES = 250  # of a change without its content


class Anomaly(Struct):
    """`at` is when it shows, on the clock of the history."""

    name: str
    conversation: int
    at: float
    sentence: str


class Reader:
    """One client, followed over all that it was given: where that leaves it, and what was wrong on the way."""

    def __init__(self, facts: Facts, client: Client) -> None:
        self._facts, self.client = facts, client
        self._cursors: dict[int, int] = {}
        self._truths: dict[int, int] = {}  # by room: the histories that all it holds may be of
        self.anomalies = list(self._follow())

    def reached(self, place: int) -> int:
        """What it was given, whatever it takes itself to have."""
        return min(self._cursors.get(place, 0), self.client.cursors[place])

    def current(self, place: int) -> bool:
        """Whether what it holds may be of the history that is left in the end."""
        return bool(self._truths.get(place, self._facts.any) & self._facts.final.bit)

    def _follow(self) -> Iterator[Anomaly]:
        for record in self.client.records:
            match record:
                case Heard():
                    yield from self._heard(record)
                case Answered():
                    yield from self._answered(record)
                case Unsubscribed():
                    self._cursors.pop(record.conversation, None)
                    self._truths.pop(record.conversation, None)

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
        yield from self._narrow(record, self._facts.holding(place, record.seen), f"was given seq {seq}")

    def _answered(self, record: Answered) -> Iterator[Anomaly]:
        place, cursor = record.conversation, self._cursors.get(record.conversation)
        after = record.after if record.asked else cursor
        if record.asked and after is not None and after > (cursor or 0):
            yield self._anomaly("skip", record, f"has {after} and was given {cursor}")
        elif record.recovered and after is not None:
            yield from self._recovered(record, after)
        else:
            if after is not None and self._needless(record, after):
                yield self._anomaly(
                    "needless-reset", record, f"was at {after} of {record.seq} and told to start over"
                )
            self._truths[place] = self._facts.answering(record) or self._facts.any
        self._cursors[place] = record.seq

    def _recovered(self, record: Answered, after: int) -> Iterator[Anomaly]:
        got = [seen.seq for seen in record.changes]
        if got != list(range(after + 1, record.seq + 1)):
            yield self._anomaly(
                "skip",
                record,
                f"asked for what comes after {after}, was told {record.seq} and given {got[:20]}",
            )
        if record.asked and not self.client.proves:
            self._truths[record.conversation] = self._facts.any
        answer = f"had {after} and was told {record.seq} and that nothing is missing"
        if after > record.seq:
            yield self._anomaly("moved-silently", record, answer)
        yield from self._narrow(record, self._facts.answering(record), answer)

    def _narrow(self, record: Heard | Answered, truths: int, what: str) -> Iterator[Anomaly]:
        """Something more that it holds. What is in no history at all is found elsewhere."""
        place = record.conversation
        held = self._truths.get(place, self._facts.any)
        if truths and not held & truths:
            what += "; that is of another history than what it holds, and it was not told to start over"
            yield self._anomaly("moved-silently", record, what)
        self._truths[place] = held & truths or truths or held

    def _needless(self, record: Answered, after: int) -> bool:
        if not 0 <= after <= record.seq or record.seq - after > REPLAY_CHANGES:
            return False
        if self.client.follows_timeline and record.asked:
            return False
        held = self._truths.get(record.conversation, self._facts.any)
        if not held & self._facts.answering(record):
            return False
        if self._missed_bytes(record) > REPLAY_BYTES:
            return False
        # What came in the same moment came in the same `ready`.
        together = (r for r in self.client.records if isinstance(r, Answered) and r.at == record.at)
        return sum(map(self._missed_bytes, together)) < READY_BYTES

    def _missed_bytes(self, record: Answered) -> int:
        if record.after is None:
            return 0
        truth = self._facts.final
        missed = range(record.after + 1, record.seq + 1)
        ids = [truth.log.get((record.conversation, seq), ("", 0))[1] for seq in missed]
        longest = (max((len(body or "") for body in truth.bodies.get(id, ())), default=0) for id in ids)
        stored = (len((truth.rows[id].content if id in truth.rows else None) or "") for id in ids)
        return sum(map(max, longest, stored)) + CHANGE_BYTES * len(ids)

    def _anomaly(self, name: str, record: Heard | Answered, what: str) -> Anomaly:
        return Anomaly(name, record.conversation, record.at, f"{self.client.name} {what}")
