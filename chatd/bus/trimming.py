"""Limits `chat.stream` by bytes, because a number of entries says little: a message has ten bytes or 30,000.

Each node reads the whole stream, so each knows at which entry the newest bytes begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

ENTRY_BYTES = 60  # approximate bytes of an entry without its payload
PARTS = 64  # each cut removes at least this fraction of the limit, so that cuts are rare


class Trimming:
    """Counts the bytes of all entries as they arrive, and says where to cut the stream. No I/O."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = 0
        self._ends: deque[tuple[str, int]] = deque()  # per part: (last id, total bytes up to it)
        self._part = 0  # bytes since the end of the last part

    def add(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> str | None:
        """Count new entries.

        Returns the id below which the stream can be cut, or None if that has not moved.
        """
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


def trim_at_start(client: Any, stream: str, most: int) -> None:
    """Cut the stream at the start, when no node knows the sizes of entries: assumes that all
    have the same size.
    """
    size = client.memory_usage(stream, samples=0) or 0
    if size > most:
        client.xtrim(stream, maxlen=client.xlen(stream) * most // size, approximate=True)
