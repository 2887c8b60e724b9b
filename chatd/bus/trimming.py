"""How much of `chat.stream` is kept: a number of bytes, for a message may have ten of them or 30,000.

Each node reads the whole stream, whoever has written it, so each can tell where its newest bytes begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

ENTRY_BYTES = 60  # that an entry takes beside its payload, about
PARTS = 64  # of what is kept: a cut takes one of them at least


class Trimming:
    """Pure: told of all entries as they come, it says up to which id they are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = 0
        self._ends: deque[tuple[str, int]] = deque()  # of parts: the last id, and all bytes up to it
        self._part = 0  # bytes since the last of them

    def add(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> str | None:
        """The id below which everything may go, when it has moved."""
        for id, fields in entries:
            size = len(fields.get(b"m", b"")) + ENTRY_BYTES
            self._total += size
            self._part += size
            if self._part * PARTS >= self._most:
                self._ends.append((id.decode(), self._total))
                self._part = 0
        cut: str | None = None
        while self._ends and self._total - self._ends[0][1] >= self._most:
            cut, _ = self._ends.popleft()
        return cut


def trim_what_is_there(client: Any, stream: str, most: int) -> None:
    """At a start nobody knows where the newest bytes begin: entries are taken to be alike."""
    size = client.memory_usage(stream, samples=0) or 0
    if size > most:
        client.xtrim(stream, maxlen=client.xlen(stream) * most // size, approximate=True)
