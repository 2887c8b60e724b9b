"""Kicks on their way to the other nodes, also to one that could not reach Redis just then.

PUBLISH would not reach it, and no row of the database repairs a kick. So kicks have a stream of their own, and
a node that is back reads again all that is kept there. A kick concerns the connections that are older than
itself: to hear it late, or twice, harms nobody.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import redis
import trio

from chatd.core.model import Kick

STREAM = "chat.kicks"
KEPT = 1000  # in Redis, some 100 bytes each, and as many that wait for it here
PIPELINE = 100
BEGINNING = "0-0"


class Kicks:
    """Those of this node that Redis has not taken yet."""

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
            if self._waiting and self._waiting[0] is one:  # those that came meanwhile may have pushed it out
                self._waiting.popleft()

    def _entry(self, kick: Kick, age: float) -> dict[Any, Any]:
        return {"n": self._node, "user": kick.user_id, "reconnect": int(kick.reconnect), "age": f"{age:.3f}"}


def heard(client: redis.Redis, entries: list[Any], node: str) -> list[Kick]:
    """The other nodes' kicks among these, with their age by Redis's clock: those of nodes may differ."""
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    kicks = (_kick(entry_id, fields, now) for entry_id, fields in entries if fields.get(b"n") != node.encode())
    return [kick for kick in kicks if kick is not None]


def _kick(entry_id: bytes, fields: dict[bytes, bytes], now: float) -> Kick | None:
    """None for what is no kick, or of a newer version."""
    try:
        age = now - int(entry_id.partition(b"-")[0]) / 1e3 + float(fields[b"age"])
        return Kick(int(fields[b"user"]), bool(int(fields[b"reconnect"])), max(0.0, age))
    except (KeyError, ValueError):
        return None
