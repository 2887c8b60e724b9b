"""Receipts: how far users have read and received a conversation, and which users have received a message."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from chatd.chat.presence import USERS, Presence
from chatd.config.settings import Settings
from chatd.store.read import members
from chatd.store.read.reader import Reader
from chatd.store.write.commands import MoveCursor, Rights
from chatd.store.write.submission import Then
from chatd.store.write.writer import Writer


class Delivery(Struct, frozen=True):
    """The delivery of a message. Each list has user ids of members, without the author."""

    read: list[int]
    delivered: list[int]
    online: list[int]
    pending: list[int]


class Receipts:
    def __init__(self, writer: Writer, read: Reader, presence: Presence, settings: Settings) -> None:
        self._writer, self._read, self._presence = writer, read, presence
        self._settings = settings

    def move(self, conversation_id: int, user_id: int, read: int, delivered: int, rights: Rights) -> MoveCursor:
        return MoveCursor(
            conversation_id=conversation_id,
            user_id=user_id,
            read=read,
            delivered=delivered,
            rights=rights,
            detail=self._settings.now.limits.members_detail,
            elsewhere=self._presence.connections(user_id) > 1,
        )

    def submit(self, moves: Sequence[MoveCursor], then: Then) -> None:
        """Queue moves of cursors; the writer calls `then` with the outcomes.

        Raises Unavailable if the queue is full.
        """
        self._writer.submit(moves, then)

    async def delivery(self, message_id: int) -> Delivery:
        """Which members have read or received a message. Raises NotFound, Unavailable."""
        author, cursors = await self._read(members.cursors_of_message, message_id)
        others = [cursor for cursor in cursors if cursor.user_id != author]
        online = {one.user_id for one in others if self._presence.has(USERS, one.user_id)}
        return Delivery(
            read=[one.user_id for one in others if one.read >= message_id],
            delivered=[one.user_id for one in others if one.delivered >= message_id],
            online=sorted(online),
            pending=[one.user_id for one in others if one.delivered < message_id and one.user_id not in online],
        )
