"""Typing events: sent to the room, never stored, and ended by a timeout if the client vanishes."""

from __future__ import annotations

from collections.abc import Callable

import trio
from msgspec import Raw, Struct

from chatd.core.model import Notice, Signal
from chatd.core.protocol import event

EVERY = 2.0  # least seconds between two events of one user in one room
EXPIRES = 6.0  # seconds after which typing ends, unless the client sends it again
TICK = 0.5  # seconds between two checks for what has ended


class _State(Struct):
    """`sent_at` (the last event) and `until` are times of trio's clock, in seconds; `until`
    0: not typing any more.
    """

    sent_at: float
    until: float


class Typing:
    """The users who are typing. No entry stays for more than about six seconds, which bounds the memory."""

    def __init__(self, tell: Callable[[Signal], None]) -> None:
        self._tell = tell
        self._states: dict[tuple[int, int], _State] = {}

    def start(self, conversation_id: int, user_id: int) -> None:
        """A user types. Does nothing within `EVERY` seconds of the last event."""
        now = trio.current_time()
        state = self._states.get((conversation_id, user_id))
        if state is not None and now - state.sent_at < EVERY:
            return
        self._states[conversation_id, user_id] = _State(now, now + EXPIRES)
        self._send(conversation_id, user_id, active=True)

    def stop(self, conversation_id: int, user_id: int) -> None:
        state = self._states.get((conversation_id, user_id))
        if state is not None and state.until:
            state.until = 0.0
            self._send(conversation_id, user_id, active=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await trio.sleep(TICK)
            now = trio.current_time()
            for key, state in list(self._states.items()):
                if state.until <= now:
                    self.stop(*key)
                if not state.until and now - state.sent_at >= EVERY:
                    del self._states[key]

    def _send(self, conversation_id: int, user_id: int, *, active: bool) -> None:
        payload = event(
            "typing",
            conversation_id=conversation_id,
            user_id=user_id,
            active=active,
            expires_in=int(EXPIRES) if active else 0,
        )
        self._tell(Notice(conversation_id, Raw(payload), besides=user_id))
