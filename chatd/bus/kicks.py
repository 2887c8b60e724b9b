"""Sends kicks to the other nodes, also to a node that cannot reach Redis at that moment.

Such a node would miss a PUBLISH, and no row of the database makes up for a missed kick. So kicks have a stream
of their own, and a node that reconnects reads all of it again. A kick ends only connections that are older than
itself, so it does no harm if it arrives late or twice.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import redis
import trio

from chatd.core.model import Kick

STREAM = "chat.kicks"
KEPT = 1000  # most kicks in the stream, about 100 bytes each; also most kicks that wait here for Redis
PIPELINE = 100
BEGINNING = "0-0"


class Kicks:
    """The kicks of this node that Redis does not have yet."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._waiting: deque[tuple[Kick, float]] = deque(maxlen=KEPT)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, kick: Kick) -> None:
        self._waiting.append((kick, trio.current_time()))

    async def send(self, client: redis.Redis) -> None:
        taken = list(islice(self._waiting, PIPELINE))
        now = trio.current_time()

        def send() -> None:
            with client.pipeline(transaction=False) as pipeline:
                for kick, asked_at in taken:
                    pipeline.xadd(STREAM, self._entry(kick, now - asked_at), maxlen=KEPT)
                pipeline.execute()

        await trio.to_thread.run_sync(send, limiter=trio.CapacityLimiter(1))
        for one in taken:
            if self._waiting and self._waiting[0] is one:  # newer kicks may have pushed it out in the meantime
                self._waiting.popleft()

    def _entry(self, kick: Kick, age: float) -> dict[Any, Any]:
        return {"n": self._node, "user": kick.user_id, "reconnect": int(kick.reconnect), "age": f"{age:.3f}"}


def heard(client: redis.Redis, entries: list[Any], node: str) -> list[Kick]:
    """The kicks of other nodes among `entries`.

    Their age is by Redis's clock, because clocks of nodes may differ.
    """
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    kicks = (_kick(entry_id, fields, now) for entry_id, fields in entries if fields.get(b"n") != node.encode())
    return [kick for kick in kicks if kick is not None]


def _kick(entry_id: bytes, fields: dict[bytes, bytes], now: float) -> Kick | None:
    """A kick; None if the entry is not valid or from a newer version of chatd."""
    try:
        age = now - int(entry_id.partition(b"-")[0]) / 1e3 + float(fields[b"age"])
        return Kick(int(fields[b"user"]), bool(int(fields[b"reconnect"])), max(0.0, age))
    except (KeyError, ValueError):
        return None
