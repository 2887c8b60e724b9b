"""Turns rows into messages. Only this module knows which column is which field of a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping, case

from chatd.core.model import Message
from chatd.store.schema import conversations, messages

# The columns that `message` needs.
MESSAGE_COLUMNS = [
    messages.c[name]
    for name in (
        "chat_conversation_id", "id", "user_id", "type", "content", "meta", "created_at", "seq",
        "client_id", "reply_to", "edited_at", "deleted_at", "reactions",
    )
]  # fmt: skip

# The mark of a conversation's last change. Versions of chatd before marks raise `last_seq` and set no mark.
MARK_OF_LAST = case((conversations.c.marked_seq == conversations.c.last_seq, conversations.c.mark)).label(
    "mark"
)


def message(row: RowMapping | Mapping[str, Any]) -> Message:
    reactions = row["reactions"]
    return Message(
        conversation_id=row["chat_conversation_id"],
        id=row["id"],
        user_id=row["user_id"],
        type=row["type"],
        content=row["content"],
        meta=row["meta"],
        created_at=row["created_at"],
        seq=row["seq"],
        client_id=row["client_id"],
        reply_to=row["reply_to"],
        edited_at=row["edited_at"],
        deleted_at=row["deleted_at"],
        reactions={emoji: users for emoji, (_, users) in reactions.items()} if reactions else None,
        reaction_counts=_uncounted(reactions) if reactions else None,
    )


def removed_message(row: RowMapping) -> Message:
    """A message that retention has removed, as a deleted one, for clients that have missed its removal."""
    return Message(
        conversation_id=row["conversation_id"],
        id=row["message_id"],
        user_id=row["user_id"],
        type=row["type"],
        content=None,
        meta=None,
        created_at=row["created_at"],
        seq=row["last_seq"],
        client_id=None,
        deleted_at=row["deleted_at"],
    )


def _uncounted(reactions: dict[str, Any]) -> dict[str, int] | None:
    """Counts of the emojis for which `reactions` does not list all users; None if there are none."""
    return {emoji: count for emoji, (count, users) in reactions.items() if count > len(users)} or None
