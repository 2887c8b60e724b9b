"""Users, for a backend: reads their presence and unread counts, disconnects, revokes and bans them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog
from msgspec import Struct

from chatd.chat.presence import USERS, Presence
from chatd.core.model import Kick, Signal
from chatd.store.read import members
from chatd.store.read.members import Unread
from chatd.store.read.reader import Reader
from chatd.store.write.commands import SetUser
from chatd.store.write.writer import Writer

log = structlog.get_logger()


class User(Struct, frozen=True):
    """A user's connections and conversations."""

    user_id: int
    online: bool
    connections: int
    conversations: list[Unread]


class Users:
    def __init__(
        self, writer: Writer, read: Reader, presence: Presence, tell: Callable[[Signal], None]
    ) -> None:
        self._writer, self._read, self._presence, self._tell = writer, read, presence, tell

    async def get(self, user_id: int) -> User:
        """A user's state; an unknown user is offline and has no conversations. Raises Unavailable."""
        conversations = await self._read(members.unread_of_user, user_id)
        connections = self._presence.connections(user_id)
        return User(user_id, self._presence.has(USERS, user_id), connections, conversations)

    def disconnect(self, user_id: int, *, reconnect: bool) -> int:
        """Close the user's connections on all nodes; returns their number.

        `reconnect`: clients may come back at once.
        """
        connections = self._presence.connections(user_id)
        self._tell(Kick(user_id, reconnect))
        log.info("user_disconnected", user_id=user_id, connections=connections)
        return connections

    async def revoke(self, user_id: int, before: float | None = None) -> None:
        """Revoke the user's tokens issued before a time (unix seconds; None: now). Raises Unavailable.

        The time is rounded up, because tokens hold whole seconds: a token from the same
        second must not survive.
        """
        moment = time.time() if before is None else before
        void = SetUser(user_id=user_id, valid_after=math.ceil(moment), now=before is None)
        await self._writer.submit([void]).outcome()
        log.info("tokens_revoked", user_id=user_id)

    async def ban(self, user_id: int, until: str | None) -> None:
        """Ban a user until a time; None ends the ban. Raises Unavailable."""
        await self._writer.submit([SetUser(user_id=user_id, banned_until=until)]).outcome()
        log.info("user_banned", user_id=user_id, until=until)

    async def issue_from(self, user_id: int) -> int:
        """`valid_after` of the user's last revocation (unix seconds); 0: there was none. Raises Unavailable."""
        return await self._read(members.valid_after, user_id)
