"""The follower of a room by itself: what it asks for, and what it tells."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from chatd.ops.client import Disconnected, Event
from chatd.ops.follower import Follower


class Script:
    """A connection that brings these events, and ends."""

    def __init__(self, *events: Event) -> None:
        self._events, self.sent = deque(events), list[Any]()

    async def next(self) -> Event:
        if not self._events:
            raise Disconnected("the end")
        return self._events.popleft()

    async def send(self, event: str, **fields: Any) -> None:
        self.sent.append((event, fields["after"]))


def message(seq: int) -> Event:
    return {"event": "message", "conversation_id": 1, "seq": seq, "mark": f"a{seq}"}


def state_of(seq: int, *changes: int) -> Event:
    told = [message(one) for one in changes]
    return {"event": "subscribed", "seq": seq, "mark": f"a{seq}", "recovered": True, "changes": told}


async def test_a_hole_is_asked_for_once_and_each_change_is_told_once() -> None:
    told: list[int] = []
    follower = Follower("ws://x", 1, log_in=str, tell=lambda event: told.append(event["seq"]))
    follower._take_state(state_of(1))
    events = (
        message(2),
        message(5),
        message(6),
        message(7),
        state_of(7, 2, 3, 4, 5, 6, 7),
        message(7),
        message(9),
    )
    script: Any = Script(*events, {"event": "error", "code": "unavailable"}, message(10), message(11))
    with pytest.raises(Disconnected):
        await follower._listen(script)
    assert told == [2, 3, 4, 5, 6, 7]
    assert script.sent == [("subscribe", 2), ("subscribe", 7), ("subscribe", 7)]
