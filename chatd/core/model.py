"""The data types of chatd: messages, changes of messages, members, signals between nodes. No behaviour.

Times are strings: RFC 3339, UTC, six digits of a second. The wire carries them so, and as strings they sort by
time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Raw, Struct, UnsetType

DEFAULT_TYPE = "text"  # the type of a message whose sender gives none
FOR_EVER = "9999-12-31T23:59:59.000000Z"  # the last moment that this format can express


class Message(Struct, frozen=True, omit_defaults=True):
    """A message, in the order of the wire. JSON leaves out fields from `reply_to` on that have no value."""

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
    reactions: dict[str, list[int]] | None = None  # emoji → the first users who reacted with it
    reaction_counts: dict[str, int] | None = None  # emoji → users, where `reactions` does not list all


class Kind(StrEnum):
    """What a change did to its message. The database stores these strings."""

    CREATED = "created"
    EDITED = "edited"
    DELETED = "deleted"
    REACTED = "reacted"


class Change(Struct, frozen=True):
    """One entry of a conversation's log. `payload` is its event as JSON, encoded once for all clients.

    `members_version` is the conversation's version at the last removal of a member before this commit, so that
    no node delivers the change to a user who was removed. Additions, roles and mutes take no right to read from
    anybody and do not count. 0: no removal is known. A huge value: the version is no longer known, and the
    node must ask the database.

    `mark` is a random string, the same for all changes of one transaction. A database that was restored from a
    backup uses a `seq` again, but with another mark. `previous` is the mark of the conversation's change before
    this one: None if there is none (seq 0, or a change older than marks), UNSET if it is not known.
    """

    conversation_id: int
    seq: int
    kind: Kind
    payload: bytes
    members_version: int = 0
    mark: str | None = None
    previous: str | UnsetType | None = UNSET


class Position(Struct, frozen=True):
    """The last change of a conversation that a client has. `after` None: the client asks for no missed changes.

    `mark` is the mark of that change: None if the change has none, UNSET if the client did not send it. In that
    case the epoch decides whether `after` belongs to the present history of the database.
    """

    after: int | None = None
    mark: str | UnsetType | None = UNSET


class State(StrEnum):
    """The state of a member's row. For a user without a row, the token or `rooms.access` decides."""

    ACTIVE = "active"
    REMOVED = "removed"
    BANNED = "banned"


class Signal(Struct, frozen=True, tag_field="signal", tag=str.lower):
    """What nodes tell each other apart from changes. A lost signal does no lasting harm: nodes also read the
    database.
    """


class MemberChange(Signal, frozen=True):
    """A user was added to a conversation or removed from it. `version` is its `members_version` afterwards.

    `quiet`: the room gets no `member` event, because the message by which the user became a member shows it.
    """

    conversation_id: int
    user_id: int
    state: State
    role: str | None
    version: int
    quiet: bool = False


class UserChange(Signal, frozen=True):
    """A user's tokens were revoked, or the user was banned or unbanned.

    Tokens from before `valid_after` (unix seconds) are void. `banned_until` is a time; None: not banned.
    """

    user_id: int
    valid_after: int
    banned_until: str | None


class Notice(Signal, frozen=True):
    """An event for a room that is not in the log of changes: a receipt, typing, or an application's own event.

    `to`: only these users get it. `besides`: this user does not get it. `lasting`: a client whose snapshot is
    just being read gets the event after the snapshot, which may be older than the event.
    """

    conversation_id: int
    payload: Raw
    to: list[int] | None = None
    besides: int | None = None
    lasting: bool = False


class Kick(Signal, frozen=True):
    """Close all connections of a user. `reconnect`: the clients may reconnect at once.

    `age` is the number of seconds since the request. Connections that logged in after it stay open.
    """

    user_id: int
    reconnect: bool
    age: float = 0.0


class Present(Signal, frozen=True):
    """The users and rooms with connections to one node, as (scope, id, connections, version).

    `chat.presence` explains scopes. `whole` is (round, part, parts) if the entries are one part of the node's
    whole state; None if they are only what has changed.
    """

    node: str
    entries: list[tuple[int, int, int, int]]
    whole: tuple[int, int, int] | None = None


class Group(Struct, frozen=True):
    """What one transaction committed. `outbox_id` is None if the bus is in memory, which needs no outbox."""

    changes: list[Change]
    members: list[MemberChange]
    outbox_id: int | None
    users: list[UserChange] = []
    notices: list[Notice] = []
    hooked: bool = False  # the transaction also stored events for the webhook


class Identity(Struct, frozen=True):
    """The user that a token identifies, and the conversations that it lists. Times are unix seconds.

    `issued_at` is the token's `iat` (0 if it has none), or the time when chatd asked the backend. `after` is
    the `valid_after` of a revocation that certainly came before this login, whatever the clocks say; None: not
    known.
    """

    user_id: int
    expires_at: float
    issued_at: float
    conversations: frozenset[int]
    after: int | None = None
    asked: bool = False  # the backend vouched for this token, and chatd may ask it again


def timestamp(moment: datetime) -> str:
    """`2026-01-01T00:00:00.000000Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def now() -> str:
    return timestamp(datetime.now(UTC))
