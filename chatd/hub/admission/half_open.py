"""Half-open connections: the client is gone, but the connection looks open until a ping goes unanswered.

A phone that loses its network leaves one behind each time. They count against the user's limit of connections
although the user has already reconnected.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from chatd.core.errors import Close
from chatd.hub.admission.registry import Guest

PROBE = 3.0  # seconds that a connection has to answer the ping while a new login waits for its place
LOOK = 0.05  # seconds between two checks for the answers


async def end_most_silent(guests: Sequence[Guest]) -> bool:
    """Ping all of a user's connections, and close the one that has been silent for longest.

    Returns False if all of them have answered. Takes as long as the slowest answer, and `PROBE` at most.
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
