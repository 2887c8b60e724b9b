"""Enter a conversation: rights, head and what was missed, in one snapshot of the database."""

from __future__ import annotations

from collections.abc import Mapping

from chatd.chat.logins import check_standing
from chatd.config import Limits, Rooms
from chatd.errors import NotFound
from chatd.limits import INBOX_ROOMS
from chatd.model import Identity
from chatd.store import reads
from chatd.store.commands import Rights
from chatd.store.reads import Reader, Snapshot


class Conversations:
    def __init__(self, read: Reader, epoch: str, rooms: Rooms, config: Limits) -> None:
        self._read, self.epoch = read, epoch
        self._open = rooms.access == "open"
        self._members_detail = config.members_detail

    def entitled(self, identity: Identity, conversation_id: int) -> bool:
        """Whether the user may enter if no row of `chat_members` says otherwise."""
        return self._open or conversation_id in identity.conversations

    def rights(self, identity: Identity, conversation_id: int) -> Rights:
        return Rights.ENTITLED if self.entitled(identity, conversation_id) else Rights.MEMBER

    async def enter(
        self, identity: Identity, conversation_id: int, after: int | None, epoch: str | None = None
    ) -> Snapshot:
        """Raises NotFound where the user may not look, Unavailable."""
        return await self._read(
            reads.snapshot,
            identity.user_id,
            self.entitled(identity, conversation_id),
            conversation_id,
            after,
            epoch in (None, self.epoch),
            self._members_detail,
        )

    async def enter_all(
        self, identity: Identity, rooms: Mapping[int, int | None], epoch: str | None
    ) -> dict[int, Snapshot | NotFound]:
        """Several conversations as of one moment; those past the bound of a `ready` lose their messages.

        Raises Revoked for a user who may not be here at all, Unavailable.
        """
        wanted = [(id, after, self.entitled(identity, id)) for id, after in rooms.items()]
        same_epoch = epoch in (None, self.epoch)
        standing, found = await self._read(
            reads.login, identity.user_id, wanted, same_epoch, self._members_detail
        )
        check_standing(identity, standing)
        return found

    async def inbox(self, identity: Identity) -> list[int]:
        """The user's conversations, the most recently active first."""
        return await self._read(reads.conversations_of, identity.user_id, INBOX_ROOMS)
