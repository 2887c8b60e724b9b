"""A client's sends, edits, deletions and reactions: submitted to the writer in order, and answered after the
commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from msgspec import UNSET

from chatd.chat.chat import Chat
from chatd.core import protocol
from chatd.core.errors import ChatError
from chatd.core.model import DEFAULT_TYPE, Identity
from chatd.hub.services import Line
from chatd.hub.session.replies import tell_error, tell_ok
from chatd.hub.session.requests import Requests
from chatd.store.write.commands import Changed, Create, Created, Delete, Edit, React, Rights
from chatd.store.write.submission import Outcome

Write = protocol.Send | protocol.Edit | protocol.Delete | protocol.React


class Writes:
    __slots__ = ("_chat", "_line", "_requests")

    def __init__(self, chat: Chat, line: Line, requests: Requests) -> None:
        self._chat, self._line, self._requests = chat, line, requests

    async def submit(self, command: Write, identity: Identity) -> None:
        """Submit a command. Waits while too many requests wait, and for the `before_message` hook. Raises
        ChatError.
        """
        rights = self._chat.conversations.rights(identity, command.conversation_id)
        wanted = to_store(command, identity, rights)
        if isinstance(wanted, Create):
            self._chat.messages.check_type(wanted.type)
        if isinstance(wanted, Create | Edit) and self._chat.before_message is not None:
            # Awaited here and not in a task, so that a client's sends and edits keep their order.
            self._chat.messages.check(wanted)
            await self._chat.messages.check_allowed(wanted)
            wanted = await self._chat.before_message.check(wanted)
        await self._requests.slot()
        try:
            self._chat.messages.submit(wanted, partial(self._written, command.ref))
            self._requests.submitted()
        except BaseException:
            self._requests.free()
            raise

    def _written(self, ref: Any, outcomes: Sequence[Outcome]) -> None:
        """Reply after the commit. The writer calls this even if the connection has ended meanwhile; nothing is
        sent then. It keeps only the command's `ref`, because a decoded command can be large.
        """
        self._requests.free()
        self._requests.written()
        (outcome,) = outcomes
        match outcome:
            case ChatError():
                tell_error(self._line, outcome, ref)
            case Created(id, seq, created_at, client_id, duplicate):
                again = {"duplicate": True} if duplicate else {}
                tell_ok(self._line, ref, id=id, seq=seq, created_at=created_at, client_id=client_id, **again)
            case Changed(id, seq):
                tell_ok(self._line, ref, id=id, seq=seq)


def to_store(command: Write, identity: Identity, rights: Rights) -> Create | Edit | Delete | React:
    common: dict[str, Any] = {
        "conversation_id": command.conversation_id,
        "user_id": identity.user_id,
        "rights": rights,
    }
    match command:
        case protocol.Send(content=content, type=type, meta=meta, client_id=client_id, reply_to=reply_to):
            return Create(
                **common,
                content=content,
                type=type or DEFAULT_TYPE,
                meta=meta,
                client_id=client_id,
                reply_to=reply_to,
            )
        case protocol.Edit(id=id, content=changed, meta=meta):
            return Edit(**common, message_id=id, content=UNSET if changed is None else changed, meta=meta)
        case protocol.Delete(id=id):
            return Delete(**common, message_id=id)
        case protocol.React(id=id, emoji=emoji, on=on):
            return React(**common, message_id=id, emoji=emoji, on=on)
