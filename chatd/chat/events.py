"""An application's own events: a backend sends them to a room or to some users in it. chatd
does not store them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Raw

from chatd.core.errors import BadRequest, FieldTooLarge
from chatd.core.limits import EVENT_BYTES
from chatd.core.model import Notice, Signal
from chatd.core.protocol import RESERVED_EVENTS, event


class Events:
    def __init__(self, tell: Callable[[Signal], None]) -> None:
        self._tell = tell

    def send(self, conversation_id: int, name: str, data: Any, user_ids: list[int] | None = None) -> None:
        """Send an event to the users in the room, or to those of `user_ids`. Raises BadRequest, TooLarge."""
        if name in RESERVED_EVENTS:
            raise BadRequest(f"chatd uses the event name {name!r} itself; choose another name.", field="event")
        payload = event(name, conversation_id=conversation_id, data=data)
        if len(payload) > EVENT_BYTES:
            size = len(payload)
            raise FieldTooLarge(f"The event has {size} bytes; {EVENT_BYTES} are allowed.", field="data")
        self._tell(Notice(conversation_id, Raw(payload), to=user_ids))
