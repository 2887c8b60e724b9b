"""Tells the backend who has come online and gone, and which rooms somebody is in: through the webhook.

Ten seconds late, so that a phone in a tunnel is no news. The node where it happened tells it; a backend that
hears of several keeps the one with the highest version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog
import trio

from chatd import calls, metrics
from chatd.chat.presence import ROOMS, USERS, Key, Presence, Transition
from chatd.errors import Unavailable
from chatd.store.commands import Notify
from chatd.store.writer import Writer

DEBOUNCE = 10.0  # seconds
TICK = 0.5  # seconds between looks at what is due

_EVENTS = {
    (USERS, True): "user.online",
    (USERS, False): "user.offline",
    (ROOMS, True): "room.occupied",
    (ROOMS, False): "room.vacated",
}
_ID = {USERS: "user_id", ROOMS: "conversation_id"}

log = structlog.get_logger()


class Attendance:
    """Bounded by what can change within ten seconds."""

    def __init__(self, writer: Writer, presence: Presence, events: Collection[str]) -> None:
        self._writer, self._presence, self._events = writer, presence, events
        self._waiting: dict[Key, tuple[float, bool]] = {}  # when to tell, and how it was before
        self.full: Callable[[], bool] = lambda: False  # the daemon's: too much waits for the backend already
        presence.watchers.append(self._changed)

    def _changed(self, change: Transition) -> None:
        if not change.ours or change.place not in _ID:
            return
        key = (change.place, change.id)
        if key not in self._waiting:
            self._waiting[key] = (trio.current_time() + DEBOUNCE, not change.present)
        elif self._waiting[key][1] is change.present:  # as it was before: nothing has happened
            del self._waiting[key]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await trio.sleep(TICK)
            now = trio.current_time()
            for key, (due, before) in list(self._waiting.items()):  # in the order of their time
                if due > now:
                    break
                present = self._presence.has(*key)
                if present is not before and not self._tell(key, present):
                    break
                del self._waiting[key]

    def _tell(self, key: Key, present: bool) -> bool:
        """False when the writer takes nothing just now."""
        place, id = key
        event = _EVENTS[place, present]
        if event not in self._events:
            return True
        if self.full():
            metrics.WEBHOOKS_DROPPED.inc()
            return True
        data = {_ID[place]: id, "version": self._presence.version(place, id)}
        try:
            self._writer.submit([Notify(event=event, body=calls.body(event, data))])
        except Unavailable:
            return False
        return True
