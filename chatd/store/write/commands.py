"""The writer's commands and their results. Plain values: no SQL, no I/O."""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from chatd.core.model import State


class Rights(Enum):
    """What allows a change. A members' row that says `removed` or `banned` overrides the last two."""

    TRUSTED = "trusted"  # the backend asks for the change
    ENTITLED = "entitled"  # the user's token lists the room, or the configuration opens all rooms
    MEMBER = "member"  # the user needs a members' row that says `active`


class Create(Struct, frozen=True, kw_only=True):
    """Store a message. The result is `Created`."""

    conversation_id: int
    user_id: int
    content: str
    type: str = "text"
    meta: Any = None
    client_id: str | None = None
    reply_to: int | None = None
    rights: Rights = Rights.TRUSTED
    asked: bytes | None = None  # hash of the client's request, if a hook has changed what to store
    fence: str | None = None  # the command fails with Superseded unless the newest `Fence` has this token

    def request_hash(self) -> bytes:
        """16 bytes that tell a retry from a conflict: a retry has the same `client_id` and the same hash."""
        if self.asked is not None:
            return self.asked
        asked = msgspec.json.encode([self.type, self.content, self.meta, self.reply_to], order="sorted")
        return hashlib.blake2b(asked, digest_size=16).digest()


class Edit(Struct, frozen=True, kw_only=True):
    """Change a message. `conversation_id` None: any conversation. `user_id` None: the backend, any author."""

    message_id: int
    conversation_id: int | None = None
    user_id: int | None = None
    content: str | UnsetType = UNSET
    meta: Any = UNSET
    rights: Rights = Rights.TRUSTED


class Delete(Struct, frozen=True, kw_only=True):
    """Delete a message; the fields are those of `Edit`."""

    message_id: int
    conversation_id: int | None = None
    user_id: int | None = None
    rights: Rights = Rights.TRUSTED


class React(Struct, frozen=True, kw_only=True):
    """Add a reaction to a message (`on`) or remove it."""

    message_id: int
    conversation_id: int
    user_id: int
    emoji: str
    on: bool
    rights: Rights = Rights.TRUSTED


class MoveCursor(Struct, frozen=True, kw_only=True):
    """A user has read and received all messages up to these ids. Smaller ids than before have no effect.

    `detail`: in a room with more members than this (0: no limit) other users get no receipt. `elsewhere`: the
    user has other connections, which get the receipt in a room of any size.
    """

    conversation_id: int
    user_id: int
    read: int = 0
    delivered: int = 0
    rights: Rights = Rights.MEMBER
    detail: int = 0
    elsewhere: bool = False


class SetUser(Struct, frozen=True, kw_only=True):
    """Revoke a user's tokens from before `valid_after` (unix seconds), or ban or unban the user.

    `now`: revoke all tokens issued until now, even if the clock was set back and `valid_after` is in the past.
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
    """A node starts to read `chat.ingest`. After this, commands with an older fencing token fail."""

    token: str


class SetMember(Struct, frozen=True, kw_only=True):
    """Add, change or remove a member. Fields that are UNSET stay as they are."""

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
    """`changed` is False if the member had that state before."""

    changed: bool


class CursorMoved(Struct, frozen=True):
    """The cursor after the command: message ids."""

    read: int
    delivered: int


class UserSet(Struct, frozen=True):
    pass


class Notified(Struct, frozen=True):
    pass


class FenceSet(Struct, frozen=True):
    pass


Result = Created | Changed | MemberSet | CursorMoved | UserSet | Notified | FenceSet
