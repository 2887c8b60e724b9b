"""What all faults have in common that take the database back in time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import trio

from tests.faults.contents import heads
from tests.faults.history import Past
from tests.faults.nemesis.field import EVERY, Field, blocking

AHEAD = (1.0, 2.0)  # seconds of posts that are lost
PASSED = 20.0  # seconds in which the new history must have passed the old one


@asynccontextmanager
async def back_in_time(field: Field) -> AsyncIterator[Past]:
    """The block takes the database back, and says what it held and what it has now.

    The clients behind `links` are away meanwhile. They come back when the new history has passed what they
    have: then a number alone does not show that it is of another one.
    """
    field.links.cut()
    try:
        async with field.workload.going_back():
            past = Past(monotonic(), 0, [], [])
            yield past
            past.until = monotonic()
            field.past.append(past)
        await _passed(field, past)
    finally:
        field.links.open()


async def _passed(field: Field, past: Past) -> None:
    with trio.move_on_after(PASSED) as patience:
        while True:
            now = await blocking(heads, field.cluster.rows)
            spoken_in = [place for place in past.held if place.last_seq]
            if all(now.get(place.id, (0, None))[0] > place.last_seq for place in spoken_in):
                return
            await trio.sleep(EVERY)
    if patience.cancelled_caught:
        field.notes.append("the new history has not passed the old one everywhere")
