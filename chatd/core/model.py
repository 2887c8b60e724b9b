"""The nouns of chatd: messages, their changes, who is in a conversation. Pure data.

Times are strings, RFC 3339 in UTC with six digits: what the wire carries and what sorts.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

DEFAULT_TYPE = "text"  # of a message whose sender names none
FOR_EVER = "9999-12-31T23:59:59.000000Z"  # the last moment that can be written


class Message(Struct, frozen=True, omit_defaults=True):
    """The flat message, in the order of the wire. A field with a default is left out if it has no value."""

    conversation_id: int
    id: int
    user_id: int
    type: str
    content: str | None
    meta: Any
    created_at: str
    seq: int
    client_id: str | None
    reply_to: int | None = None
    edited_at: str | None = None
    deleted_at: str | None = None
    reactions: dict[str, list[int]] | None = None  # by emoji, the first who gave it
    reaction_counts: dict[str, int] | None = None  # of those that more gave than are named


class Kind(StrEnum):
    """What a change did, as the log keeps it."""

    CREATED = "created"
    EDITED = "edited"
    DELETED = "deleted"
    REACTED = "reacted"


class Change(Struct, frozen=True):
    """One step of a conversation's log. `payload` is its event as JSON, encoded once for everybody.

    `members_version` is the one at which somebody was last removed from the conversation before this was
    committed: who was removed shall not hear it. Who comes, and a role or a mute, take no right from anybody.
    0 says nothing; a huge one, that it is not known any more and the database must be asked.

    `mark` is random, the same for all that one transaction committed: a database that went back in time and
    uses a `seq` again gives it another mark. `previous` is the mark of the change before this one in the
    conversation. None says that there is none (seq 0, or a change older than marks), UNSET that it is
    not known.
    """

    conversation_id: int
    seq: int
    kind: Kind
    payload: bytes
    members_version: int = 0
    mark: str | None = None
    previous: str | UnsetType | None = UNSET


class Position(Struct, frozen=True):
    """Up to which change somebody has a conversation; without `after` up to none that matters.

    `mark` is that change's. None says that it has none, UNSET that it is not known: the epoch decides then
    whether `after` is a change of this history.
    """

    after: int | None = None
    mark: str | UnsetType | None = UNSET


class State(StrEnum):
    """A member's row. No row at all is neither: the token or an open deployment decides then."""

    ACTIVE = "active"
    REMOVED = "removed"
    BANNED = "banned"


class Signal(Struct, frozen=True, tag_field="signal", tag=str.lower):
    """What nodes tell each other beside the log of changes. None of it is needed to be right in the end."""


class MemberChange(Signal, frozen=True):
    """Somebody was added to or removed from a conversation, whose `members_version` that made `version`.

    `quiet`: the room is not told. Who becomes a member by posting is announced by the message itself.
    """

    conversation_id: int
    user_id: int
    state: State
    role: str | None
    version: int
    quiet: bool = False


class UserChange(Signal, frozen=True):
    """A user's tokens were revoked, or the user banned: unix seconds, and a moment or None."""

    user_id: int
    valid_after: int
    banned_until: str | None


class Notice(Signal, frozen=True):
    """An event for a room that has no seq: a receipt, typing, an application's own.

    `to`: these users alone; `besides`: all but this one. `lasting`: who is just reading a snapshot, which may
    be older, gets it after that.
    """

    conversation_id: int
    payload: Raw
    to: list[int] | None = None
    besides: int | None = None
    lasting: bool = False


class Kick(Signal, frozen=True):
    """End the connections of a user; `reconnect`: they may come back at once.

    `age`: seconds since it was asked for. Who has logged in after that is not meant.
    """

    user_id: int
    reconnect: bool
    age: float = 0.0


class Present(Signal, frozen=True):
    """Who is connected to a node: (scope, id, connections, version); `chat.presence` says what scopes are.

    `whole` is (round, part, parts) of all it has, None for what has changed.
    """

    node: str
    entries: list[tuple[int, int, int, int]]
    whole: tuple[int, int, int] | None = None


class Group(Struct, frozen=True):
    """What one transaction committed. `outbox_id` is None where no bus outlives this process."""

    changes: list[Change]
    members: list[MemberChange]
    outbox_id: int | None
    users: list[UserChange] = []
    notices: list[Notice] = []
    hooked: bool = False  # there is something for the webhook


class Identity(Struct, frozen=True):
    """Who a token speaks for. Times are unix seconds; `conversations` are those that the token lists.

    `issued_at` is what the token says, 0 if nothing, or when the backend was asked. `after` is the revocation
    (its `valid_after`) that this login is known to be later than, whatever clocks say; None: not known.
    """

    user_id: int
    expires_at: float
    issued_at: float
    conversations: frozenset[int]
    after: int | None = None
    asked: bool = False  # the backend has said so, and may be asked again


def timestamp(moment: datetime) -> str:
    """`2026-01-01T00:00:00.000000Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def now() -> str:
    return timestamp(datetime.now(UTC))
