"""Connections that went dark: they look open until a ping has gone unanswered, and hold the places of a user
who has long come back. A phone that loses its network leaves one behind each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from chatd.core.errors import Close
from chatd.hub.admission.registry import Guest

PROBE = 3.0  # seconds for a sign of life, where somebody waits for the place
LOOK = 0.05  # seconds between looks for it


async def end_most_silent(guests: Sequence[Guest]) -> bool:
    """Ask all of a user's connections for a sign of life, and end the one that has been silent for longest.

    False if all of them have given one. Takes as long as the slowest answer, and `PROBE` at most.
    """
    lines = [guest.line for guest in guests if not guest.line.ended]
    for line in lines:
        line.probe()
    while not any(line.ended for line in lines):
        now = trio.current_time()
        silence, most_silent = max(((line.silent_for(now), line) for line in lines), key=lambda one: one[0])
        if not silence:
            return False
        if silence >= PROBE:
            most_silent.close_soon(Close.NO_PONG, "no sign of life")
            return True
        await trio.sleep(LOOK)
    return True
