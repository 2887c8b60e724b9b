"""What a client wants to be stored, as the store's commands. Pure."""

from __future__ import annotations

from chatd import protocol
from chatd.model import Identity
from chatd.store.commands import Create, Delete, Edit, React, Rights

Write = protocol.Send | protocol.Edit | protocol.Delete | protocol.React


def to_store(command: Write, identity: Identity, rights: Rights) -> Create | Edit | Delete | React:
    match command:
        case protocol.Send():
            return Create(
                conversation_id=command.conversation_id,
                user_id=identity.user_id,
                content=command.content,
                type=command.type,
                meta=command.meta,
                client_id=command.client_id,
                reply_to=command.reply_to,
                rights=rights,
            )
        case protocol.Edit():
            return Edit(
                message_id=command.id,
                conversation_id=command.conversation_id,
                user_id=identity.user_id,
                content=command.content,
                meta=command.meta,
                rights=rights,
            )
        case protocol.Delete():
            return Delete(
                message_id=command.id,
                conversation_id=command.conversation_id,
                user_id=identity.user_id,
                rights=rights,
            )
        case protocol.React():
            return React(
                message_id=command.id,
                conversation_id=command.conversation_id,
                user_id=identity.user_id,
                emoji=command.emoji,
                on=command.on,
                rights=rights,
            )
