"""Decides which other nodes are alive, by the heartbeats of their leases in the database. No I/O.

A lease holds no time, because clocks differ and can be set. A node raises the beat of its lease. Another node
that reads the same beat several times considers the node dead. It counts its reads and not seconds, so that
neither a pause of its own nor an outage of the database makes it consider a living node dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from chatd.store.queues.presence import Seen

BEAT = 2.0  # seconds between two heartbeats, and between two reads of the others' heartbeats
LOOKS = 5  # reads of the same beat after which a node is dead
NAMES = 1000  # most names of former nodes to remember


class Life(Enum):
    HELD = "held"
    OVER = "over"
    UNKNOWN = "unknown"  # the node never had a lease, for example with a version of chatd before leases


class Leases:
    def __init__(self) -> None:
        self._looks: dict[str, tuple[Seen, int]] = {}  # lease → (its last state, reads of that same state)
        self._known: dict[str, None] = {}  # names of nodes that have or had a lease

    def see(self, others: Iterable[Seen]) -> list[Seen]:
        """Note a new read of all other leases. Returns those of dead nodes."""
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
        """Whether a node is alive. `node` is its name on the bus."""
        if any(seen.node == node and not self._is_over(seen, count) for seen, count in self._looks.values()):
            return Life.HELD
        return Life.OVER if node in self._known else Life.UNKNOWN
