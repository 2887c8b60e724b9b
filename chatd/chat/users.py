"""Users, as a backend sees them: who is there, what is unread, and whom it sends away."""

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
        """Raises Unavailable. A user whom nobody has heard of is offline and nowhere a member."""
        conversations = await self._read(members.unread_of_user, user_id)
        connections = self._presence.connections(user_id)
        return User(user_id, self._presence.has(USERS, user_id), connections, conversations)

    def disconnect(self, user_id: int, *, reconnect: bool) -> int:
        """End the user's connections on all nodes; returns how many there were."""
        connections = self._presence.connections(user_id)
        self._tell(Kick(user_id, reconnect))
        log.info("user_disconnected", user_id=user_id, connections=connections)
        return connections

    async def revoke(self, user_id: int, before: float | None = None) -> None:
        """Void the tokens issued before a moment (unix seconds; now). Raises Unavailable.

        Tokens tell whole seconds: to the next one, so that none of this second outlives it.
        """
        moment = time.time() if before is None else before
        void = SetUser(user_id=user_id, valid_after=math.ceil(moment), now=before is None)
        await self._writer.submit([void]).outcome()
        log.info("tokens_revoked", user_id=user_id)

    async def ban(self, user_id: int, until: str | None) -> None:
        """Until a moment; None ends it. Raises Unavailable."""
        await self._writer.submit([SetUser(user_id=user_id, banned_until=until)]).outcome()
        log.info("user_banned", user_id=user_id, until=until)

    async def issue_from(self, user_id: int) -> int:
        """The user's last revocation: its `valid_after`, 0 if there was none. Raises Unavailable."""
        return await self._read(members.valid_after, user_id)
