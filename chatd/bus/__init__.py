"""The bus: gives a committed group to this node's fanout first, and to Redis after, if there is one.

Receiver   what the fanout offers: changes, signals, foreign payloads, and whether the links are up
Bus        what the daemon holds: `publish` for the writer, `run` for the nursery
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from chatd.core.model import Change, Group, Signal


class Receiver(Protocol):
    """All synchronous and bounded: a receiver that is overrun repairs itself from the database."""

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        """`committed_at`: by trio's clock, if it was this node."""

    def signal(self, signal: Signal) -> None: ...
    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None: ...

    def links(self, up: bool) -> None:
        """Whether other nodes' changes come by themselves just now."""

    def lost(self) -> None:
        """Something may have been missed: look into the database at once."""


class Bus(Protocol):
    @property
    def up(self) -> bool:
        """False while something that other nodes or services need does not get through."""

    def publish(self, group: Group) -> None:
        """Never waits: called by the writer after each commit."""

    def tell(self, signal: Signal) -> None:
        """What is not stored: this node at once, the others if Redis is there. Never waits."""

    async def run(
        self, receiver: Receiver, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Give all that comes to `receiver`. Nothing may be published or told before this runs."""


def give_to(receiver: Receiver, group: Group) -> None:
    """Rights first: a message of the same group shall not reach who was removed by it."""
    for right in (*group.members, *group.users):
        receiver.signal(right)
    if group.changes:
        receiver.changes(group.changes, trio.current_time())
    for notice in group.notices:
        receiver.signal(notice)
