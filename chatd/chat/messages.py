"""Messages: a backend posts, a user sends, both edit, delete and read the history.

These functions check a command before they queue it. What needs the database is checked in its transaction.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from chatd.config import ANY_TYPE
from chatd.config.settings import Settings
from chatd.core.errors import BadRequest, ChatError, Forbidden
from chatd.core.protocol import check_content, check_label, check_meta
from chatd.store.read import lookups
from chatd.store.read.lookups import Page
from chatd.store.read.reader import Reader
from chatd.store.write import permits
from chatd.store.write.commands import Changed, Create, Created, Delete, Edit, Fence, React
from chatd.store.write.submission import Submission, Then
from chatd.store.write.writer import Writer


class Messages:
    def __init__(self, writer: Writer, read: Reader, settings: Settings) -> None:
        self._writer, self._read, self._settings = writer, read, settings

    def check(self, command: Create | Edit) -> None:
        """Check the content of a command. Raises BadRequest or TooLarge, with the field."""
        limits = self._settings.now.limits
        if isinstance(command.content, str):
            check_content(command.content, limits.content_chars)
        if command.meta is not UNSET:
            check_meta(command.meta, limits.meta_bytes)
        if isinstance(command, Create):
            check_label("type", command.type)
            check_label("client_id", command.client_id)
        elif command.content is UNSET and command.meta is UNSET:
            raise BadRequest("The edit changes nothing: send content or meta.", field="content")

    def check_type(self, name: str) -> None:
        """Raises Forbidden if only backends may send messages of this type."""
        allowed = self._settings.now.rooms.client_types
        if name not in allowed and ANY_TYPE not in allowed:
            raise Forbidden(f"clients may not send messages of the type {name!r}", field="type")

    async def check_allowed(self, command: Create | Edit) -> None:
        """Check a user's rights before the backend's hook is asked. The transaction decides
        again when it stores.

        Raises NotFound, Muted, Forbidden, Unavailable.
        """
        await self._read(permits.look, command)

    def submit(self, command: Create | Edit | Delete | React, then: Then | None = None) -> Submission:
        """Check and queue one command; commits happen in the order of the calls. Raises BadRequest, TooLarge,
        Unavailable.
        """
        if isinstance(command, React):
            check_label("emoji", command.emoji)
        elif not isinstance(command, Delete):
            self.check(command)
        return self._writer.submit([command], then)

    async def post_all(self, commands: list[Create | ChatError]) -> list[Created | ChatError]:
        """Post many messages, each accepted or refused by itself. A ChatError among
        `commands` stays in its place.

        Raises Unavailable if nothing was queued.
        """
        accepted = [command for command in commands if isinstance(command, Create)]
        outcomes = iter(await self._writer.submit(accepted).outcomes() if accepted else [])
        return [command if isinstance(command, ChatError) else next(outcomes) for command in commands]  # type: ignore[misc]

    async def fence(self, token: str) -> None:
        """Set the fencing token: commands with another token fail with Superseded from now on.

        Raises Unavailable.
        """
        await self._writer.submit([Fence(token=token)]).outcome()

    async def edit(self, message_id: int, content: str | UnsetType, meta: Any) -> Changed:
        outcome = await self.submit(Edit(message_id=message_id, content=content, meta=meta)).outcome()
        assert isinstance(outcome, Changed)
        return outcome

    async def delete(self, message_id: int) -> Changed:
        outcome = await self.submit(Delete(message_id=message_id)).outcome()
        assert isinstance(outcome, Changed)
        return outcome

    async def history(
        self, conversation_id: int, before: int | None = None, after: int | None = None, limit: int = 50
    ) -> Page:
        """A page for a backend; empty for a conversation without messages. Raises BadRequest, Unavailable."""
        _check_page(before, after)
        return await self._read(lookups.history, conversation_id, before, after, limit)

    async def history_for(
        self,
        user_id: int,
        entitled: bool,
        conversation_id: int,
        before: int | None,
        after: int | None,
        limit: int,
    ) -> Page:
        """A page for a user. Raises NotFound if the user may not enter, BadRequest, Unavailable."""
        _check_page(before, after)
        return await self._read(lookups.history_for, user_id, entitled, conversation_id, before, after, limit)


def _check_page(before: int | None, after: int | None) -> None:
    if before is not None and after is not None:
        raise BadRequest("Send before or after, not both.", field="after")
