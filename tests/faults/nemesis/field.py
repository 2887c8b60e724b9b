"""Where a fault strikes, and what many of them need."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from msgspec import Struct

from tests.faults.cluster import Cluster
from tests.faults.history import Past
from tests.faults.links import Links
from tests.faults.workload import Workload

EVERY = 0.25  # seconds between two blows of a fault that strikes again and again


class Field(Struct):
    """The crowd with `crowd_pid` is the second half of the clients; some more come through `links`."""

    cluster: Cluster
    workload: Workload
    links: Links
    crowd_pid: int
    seconds: float
    dice: random.Random
    notes: list[str]  # what was done, for the report
    troubles: list[str]  # what must not have happened, beyond what the checker sees
    past: list[Past]  # the histories that a fault has ended


Fault = Callable[[Field], Awaitable[None]]


async def blocking(work: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(work, *arguments, limiter=trio.CapacityLimiter(1))


async def strikes(field: Field, *, every: float) -> Any:
    """Once at least, until the time is over."""
    ends = trio.current_time() + field.seconds
    count = 0
    while count == 0 or trio.current_time() < ends:
        yield count
        count += 1
        await trio.sleep(every * field.dice.uniform(0.5, 1.0))
    field.notes.append(f"{count} times")
