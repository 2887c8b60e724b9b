"""What the import reads, what it makes of that, and what is wrong with a row. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

REQUIRED = ("id", "chat_conversation_id", "user_id", "type", "content", "meta", "created_at", "updated_at")
OPTIONAL = ("client_id", "reply_to", "edited_at", "deleted_at")
SHOWN = 40  # characters of a wrong value that a sentence quotes


class Problem(Exception):
    """A row cannot be imported. `kind` completes a sentence about the column: `is not an integer`.

    `column` is empty if the whole row is wrong. `value` is quoted in the sentence; None for the texts of
    messages, which belong in no log.
    """

    def __init__(self, column: str, kind: str, value: Any = None) -> None:
        super().__init__(column, kind)
        self.column, self.kind, self.value = column, kind, value

    def __str__(self) -> str:
        subject = "the value" if self.value is None else repr(str(self.value)[:SHOWN])
        return f"column {self.column}: {subject} {self.kind}" if self.column else f"it {self.kind}"


class Record(NamedTuple):
    """One row as the source has it. `place` counts from 1; in a file it is the row's first line."""

    place: int
    values: Mapping[str, Any]
    problem: Problem | None = None  # the source itself could not read the row


class Row(Struct, frozen=True):
    """A message to import. Times are those of the wire, `meta` is JSON text. A deleted one has no content."""

    id: int
    conversation_id: int
    user_id: int
    type: str
    content: str | None
    meta: str | None
    created_at: str
    updated_at: str
    client_id: str | None
    request_hash: bytes
    reply_to: int | None
    edited_at: str | None
    deleted_at: str | None
    record: Record


class Source(Protocol):
    """`noun` says what `place` counts: `line` or `row`."""

    noun: str

    @property
    def ignored(self) -> list[str]:
        """Columns that the import does not know; complete after the first record."""

    def records(self) -> Iterator[Record]: ...

    def share(self) -> float | None:
        """How much of the source has been read, from 0 to 1; None if its size is not known."""

    def close(self) -> None: ...
