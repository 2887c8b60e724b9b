"""The embedded default: one process, so a committed group goes to its own fanout and that is all."""

from __future__ import annotations

import trio

from chatd.bus import Receiver, give_to
from chatd.core.model import Group, Signal


class MemoryBus:
    up = True

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def publish(self, group: Group) -> None:
        give_to(self._receiver, group)

    def tell(self, signal: Signal) -> None:
        self._receiver.signal(signal)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
