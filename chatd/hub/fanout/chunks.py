"""Consecutive changes of a room as bytes for everybody: encoded once, joined once. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UnsetType

from chatd.core.model import Change, Kind
from chatd.core.protocol import text_frame

CHUNK_BYTES = 64 * 1024  # frames joined into one write


class Chunk:
    """Consecutive changes of one room, as frames: encoded once, joined once, the same bytes for everybody."""

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
        """Whether the change at a cursor, with its mark, is the one before this chunk, or in it."""
        if cursor + 1 == self.first:
            return self.previous == mark
        return self.first <= cursor <= self.last and self._changes[cursor - self.first].mark == mark

    def after(self, cursor: int, flat: bool) -> bytes:
        """The frames that are new to a cursor; a flat listener knows nothing but new messages."""
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
    """Cut a run of changes where a joined write would get too long."""
    return map(Chunk, runs(changes, CHUNK_BYTES))


def runs(changes: Sequence[Change], most: int) -> Iterator[Sequence[Change]]:
    """The same in several, of so many bytes at most: more only where one change has more."""
    start = size = 0
    for index, change in enumerate(changes):
        if index > start and size + len(change.payload) > most:
            yield changes[start:index]
            start, size = index, 0
        size += len(change.payload) + 1  # a comma, where they are in one frame
    if changes:
        yield changes[start:]
