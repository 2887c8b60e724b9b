"""The bus: passes a committed group to this node's fanout, and then to Redis, if it is configured.

Receiver   the interface of the fanout: takes changes, signals, foreign payloads, and the state of the links
Bus        the interface for the daemon: the writer calls `publish`, a nursery runs `run`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from chatd.core.model import Change, Group, Signal


class Receiver(Protocol):
    """Takes what the bus delivers. All functions are synchronous, and a receiver's buffers are bounded: one
    that overflows reads the database instead.
    """

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        """`committed_at`: time of the commit by trio's clock, if this node made it; else None."""

    def signal(self, signal: Signal) -> None: ...
    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None: ...

    def links(self, up: bool) -> None:
        """The links went up or down.

        While they are down, changes of other nodes do not arrive by themselves.
        """

    def lost(self) -> None:
        """Changes may have been missed: read the database at once."""


class Bus(Protocol):
    @property
    def up(self) -> bool:
        """False while a link is down, so that other nodes or services may miss something."""

    def publish(self, group: Group) -> None:
        """Publish a committed group; the writer calls this after each commit. Never blocks."""

    def tell(self, signal: Signal) -> None:
        """Send a signal, which is not stored: to this node at once, to the others if Redis answers.

        Never blocks.
        """

    async def run(
        self, receiver: Receiver, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Deliver everything that arrives to `receiver`.

        Do not call `publish` or `tell` before this has started.
        """


def give_to(receiver: Receiver, group: Group) -> None:
    """Deliver a group on this node.

    Changes of rights go first, so that a removed user gets no message of the group.
    """
    for right in (*group.members, *group.users):
        receiver.signal(right)
    if group.changes:
        receiver.changes(group.changes, trio.current_time())
    for notice in group.notices:
        receiver.signal(notice)
