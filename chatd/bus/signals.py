"""A queue of encoded signals for Redis, bounded in number and bytes. When it is full, it drops the oldest."""

from __future__ import annotations

from collections import deque

KEPT = 10_000
KEPT_BYTES = 8 * 1024 * 1024  # a custom event has 64 KiB
PIPELINE, PIPELINE_BYTES = 1000, 256 * 1024  # most signals and bytes per round trip


class WaitingSignals:
    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, signal: bytes) -> None:
        self._waiting.append(signal)
        self._bytes += len(signal)
        while len(self._waiting) > KEPT or self._bytes > KEPT_BYTES:
            self._drop()

    def clear(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    def first(self) -> list[bytes]:
        """The signals for the next round trip. They stay in the queue until `done`."""
        taken: list[bytes] = []
        size = 0
        for signal in self._waiting:
            size += len(signal)
            if taken and (len(taken) == PIPELINE or size > PIPELINE_BYTES):
                break
            taken.append(signal)
        return taken

    def done(self, taken: list[bytes]) -> None:
        """Remove the signals that Redis has. Newer signals may have pushed some of them out already."""
        for signal in taken:
            if self._waiting and self._waiting[0] is signal:
                self._drop()

    def _drop(self) -> None:
        self._bytes -= len(self._waiting.popleft())
