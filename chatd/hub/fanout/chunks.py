"""Consecutive changes of a room, encoded and joined once for all subscriptions. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UnsetType

from chatd.core.model import Change, Kind
from chatd.core.protocol import text_frame

CHUNK_BYTES = 64 * 1024  # frames joined into one write


class Chunk:
    """Consecutive changes of one room as frames. All subscriptions get the same bytes."""

    __slots__ = (
        *("_changes", "_flat", "_frames", "first", "joined", "last"),
        *("mark", "members_version", "previous"),
    )

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._frames = [text_frame(change.payload) for change in changes]
        self._flat: bytes | None = None
        self.first, self.last = changes[0].seq, changes[-1].seq
        self.previous, self.mark = changes[0].previous, changes[-1].mark
        self.joined = b"".join(self._frames)
        self.members_version = max(change.members_version for change in changes)

    def follows(self, cursor: int, mark: str | UnsetType | None) -> bool:
        """Whether the change at `cursor` with this `mark` is in this chunk or directly before it."""
        if cursor + 1 == self.first:
            return self.previous == mark
        return self.first <= cursor <= self.last and self._changes[cursor - self.first].mark == mark

    def after(self, cursor: int, flat: bool) -> bytes:
        """Return the frames with `seq > cursor`. A flat listener gets only those of new messages."""
        if cursor < self.first and not flat:
            return self.joined
        if cursor < self.first and self._flat is not None:
            return self._flat
        wanted = b"".join(
            frame
            for change, frame in zip(self._changes, self._frames, strict=True)
            if change.seq > cursor and (not flat or change.kind is Kind.CREATED)
        )
        if cursor < self.first:
            self._flat = wanted
        return wanted


def chunks(changes: Sequence[Change]) -> Iterator[Chunk]:
    """Divide consecutive changes into chunks of at most CHUNK_BYTES, except where one change is larger."""
    return map(Chunk, runs(changes, CHUNK_BYTES))


def runs(changes: Sequence[Change], most: int) -> Iterator[Sequence[Change]]:
    """Divide changes into runs of at most `most` bytes, except where one change is larger."""
    start = size = 0
    for index, change in enumerate(changes):
        if index > start and size + len(change.payload) > most:
            yield changes[start:index]
            start, size = index, 0
        size += len(change.payload) + 1  # the comma between two changes in one frame
    if changes:
        yield changes[start:]
