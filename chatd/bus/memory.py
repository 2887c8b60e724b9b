"""The bus without Redis: there is one process, so a committed group goes only to its own fanout."""

from __future__ import annotations

import trio

from chatd.bus import Receiver, give_to
from chatd.core.model import Group, Signal


class MemoryBus:
    up = True

    def __init__(self) -> None:
        self._receiver: Receiver

    def publish(self, group: Group) -> None:
        give_to(self._receiver, group)

    def tell(self, signal: Signal) -> None:
        self._receiver.signal(signal)

    async def run(
        self, receiver: Receiver, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._receiver = receiver
        task_status.started()
