"""Who is typing: told to the room, never stored, and over by itself also when the typist has vanished."""

from __future__ import annotations

from collections.abc import Callable

import trio
from msgspec import Raw, Struct

from chatd.core.model import Notice, Signal
from chatd.core.protocol import event

EVERY = 2.0  # seconds between two that are told of one user in one room
EXPIRES = 6.0  # seconds until it is over, unless it is said again
TICK = 0.5  # seconds between looks at what is over


class _State(Struct):
    """`told_at` and `until` are moments of trio's clock; `until` of 0: not typing any more."""

    told_at: float
    until: float


class Typing:
    """Bounded by what connections may ask in six seconds: nothing is kept for longer."""

    def __init__(self, tell: Callable[[Signal], None]) -> None:
        self._tell = tell
        self._states: dict[tuple[int, int], _State] = {}

    def start(self, conversation_id: int, user_id: int) -> None:
        """What comes too soon after the last is ignored."""
        now = trio.current_time()
        state = self._states.get((conversation_id, user_id))
        if state is not None and now - state.told_at < EVERY:
            return
        self._states[conversation_id, user_id] = _State(now, now + EXPIRES)
        self._say(conversation_id, user_id, active=True)

    def stop(self, conversation_id: int, user_id: int) -> None:
        state = self._states.get((conversation_id, user_id))
        if state is not None and state.until:
            state.until = 0.0
            self._say(conversation_id, user_id, active=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await trio.sleep(TICK)
            now = trio.current_time()
            for key, state in list(self._states.items()):
                if state.until <= now:
                    self.stop(*key)
                if not state.until and now - state.told_at >= EVERY:
                    del self._states[key]

    def _say(self, conversation_id: int, user_id: int, *, active: bool) -> None:
        payload = event(
            "typing",
            conversation_id=conversation_id,
            user_id=user_id,
            active=active,
            expires_in=int(EXPIRES) if active else 0,
        )
        self._tell(Notice(conversation_id, Raw(payload), besides=user_id))
