"""What the writer can be asked to do, and what it answers. Plain values: no SQL, no waiting."""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from chatd.core.model import State


class Rights(Enum):
    """On whose word a change is made. A `removed` or `banned` row beats the last two."""

    TRUSTED = "trusted"  # the backend's
    ENTITLED = "entitled"  # a user's whose token or deployment opens the room
    MEMBER = "member"  # a user's who needs an active row


class Create(Struct, frozen=True, kw_only=True):
    conversation_id: int
    user_id: int
    content: str
    type: str = "text"
    meta: Any = None
    client_id: str | None = None
    reply_to: int | None = None
    rights: Rights = Rights.TRUSTED
    asked: bytes | None = None  # the request's hash, where something else is stored than was asked for
    fence: str | None = None  # refused with Superseded unless the newest `Fence` has this token

    def request_hash(self) -> bytes:
        """What makes a second request with the same `client_id` a retry, not a conflict."""
        if self.asked is not None:
            return self.asked
        asked = msgspec.json.encode([self.type, self.content, self.meta, self.reply_to], order="sorted")
        return hashlib.blake2b(asked, digest_size=16).digest()


class Edit(Struct, frozen=True, kw_only=True):
    """Without `conversation_id` the message is looked for by its id alone; without `user_id` anybody's."""

    message_id: int
    conversation_id: int | None = None
    user_id: int | None = None
    content: str | UnsetType = UNSET
    meta: Any = UNSET
    rights: Rights = Rights.TRUSTED


class Delete(Struct, frozen=True, kw_only=True):
    message_id: int
    conversation_id: int | None = None
    user_id: int | None = None
    rights: Rights = Rights.TRUSTED


class React(Struct, frozen=True, kw_only=True):
    """Give a reaction to a message or take it back."""

    message_id: int
    conversation_id: int
    user_id: int
    emoji: str
    on: bool
    rights: Rights = Rights.TRUSTED


class MoveCursor(Struct, frozen=True, kw_only=True):
    """Everything up to these message ids is read, or received. Back it never goes.

    `detail`: in a room with more members nobody else is told. `elsewhere`: the user has other connections,
    which are told in a room of any size.
    """

    conversation_id: int
    user_id: int
    read: int = 0
    delivered: int = 0
    rights: Rights = Rights.MEMBER
    detail: int = 0
    elsewhere: bool = False


class SetUser(Struct, frozen=True, kw_only=True):
    """Void a user's tokens issued before `valid_after` (unix seconds), or ban the user for a time.

    `now`: void all that were issued until now; the clock may say that this was before.
    """

    user_id: int
    valid_after: int = 0
    now: bool = False
    banned_until: str | UnsetType | None = UNSET


class Notify(Struct, frozen=True, kw_only=True):
    """An event for the webhook."""

    event: str
    body: bytes


class Fence(Struct, frozen=True, kw_only=True):
    """A reader of `chat.ingest` begins: what others have read before is not committed after this."""

    token: str


class SetMember(Struct, frozen=True, kw_only=True):
    """Add or remove a member. What is UNSET stays as it is."""

    conversation_id: int
    user_id: int
    state: State
    role: str | UnsetType | None = UNSET
    muted_until: str | UnsetType | None = UNSET


AnyCommand = Create | Edit | Delete | React | MoveCursor | SetMember | SetUser | Notify | Fence


class Created(Struct, frozen=True):
    id: int
    seq: int
    created_at: str
    client_id: str | None
    duplicate: bool


class Changed(Struct, frozen=True):
    id: int
    seq: int


class MemberSet(Struct, frozen=True):
    """`changed` is false when the member was in that state already."""

    changed: bool


class CursorMoved(Struct, frozen=True):
    """Where it stands now."""

    read: int
    delivered: int


class UserSet(Struct, frozen=True):
    pass


class Notified(Struct, frozen=True):
    pass


class FenceSet(Struct, frozen=True):
    pass


Result = Created | Changed | MemberSet | CursorMoved | UserSet | Notified | FenceSet
