"""What a client wants to be stored, as the store's commands. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from chatd.core import protocol
from chatd.core.model import DEFAULT_TYPE, Identity
from chatd.store.write.commands import Create, Delete, Edit, React, Rights

Write = protocol.Send | protocol.Edit | protocol.Delete | protocol.React


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
