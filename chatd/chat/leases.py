"""Which other nodes run, judged by their leases in the database. Pure.

A lease has no time in it: clocks differ and are set. A node raises the beat of its lease, and another that
looks at it several times and sees no beat takes it for dead. Looks are counted, not seconds: neither a node
that was frozen itself nor a database that was away makes anybody take the living for dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from chatd.store.queues.presence import Seen

BEAT = 2.0  # seconds between two beats, and between two looks at those of the others
LOOKS = 5  # without a beat between them: its node is gone
NAMES = 1000  # of nodes that once had a lease


class Life(Enum):
    HELD = "held"
    OVER = "over"
    UNKNOWN = "unknown"  # it never had a lease: a version before leases, say


class Leases:
    def __init__(self) -> None:
        self._looks: dict[str, tuple[Seen, int]] = {}  # by lease, and how often it was seen like that
        self._known: dict[str, None] = {}  # names of nodes

    def see(self, others: Iterable[Seen]) -> list[Seen]:
        """One more look at all of the others' leases. Returns those whose nodes are gone."""
        before, self._looks = self._looks, {}
        for seen in others:
            was, count = before.get(seen.name, (seen, 0))
            self._looks[seen.name] = (seen, count + 1 if was == seen else 1)
            self._known[seen.node] = None
        while len(self._known) > NAMES:
            del self._known[next(iter(self._known))]
        return [seen for seen, count in self._looks.values() if self._is_over(seen, count)]

    @staticmethod
    def _is_over(seen: Seen, count: int) -> bool:
        return count > LOOKS or seen.ending

    def life(self, node: str) -> Life:
        """Of a node, by its name on the bus."""
        if any(seen.node == node and not self._is_over(seen, count) for seen, count in self._looks.values()):
            return Life.HELD
        return Life.OVER if node in self._known else Life.UNKNOWN
