"""The interfaces that a room uses: its sessions, and the watcher that is notified of its subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from chatd.hub.fanout.subscription import Subscription


class Listener(Protocol):
    """What a subscription needs of its session."""

    user_id: int
    flat: bool

    def push(self, frames: bytes) -> None: ...
    def try_push(self, frames: bytes) -> bool:
        """Push frames that can be read again later. Returns False if too much is queued already."""

    def offer(self, frames: bytes) -> bool:
        """Push optional frames. Returns False if they were dropped."""

    def resync(self, subscription: Subscription) -> None:
        """Read the room again for this subscription and send the answer, without a request of the client."""

    def fall_behind(self, subscription: Subscription) -> None:
        """Read the changes after its cursor from the database, as fast as the client takes them, until it is
        live again.
        """

    def dropped(self, subscription: Subscription) -> None:
        """The server ends the subscription."""


class Watcher(Protocol):
    """Is called, synchronously, after a room has gained or lost a subscription."""

    def joined(self, subscription: Subscription) -> None: ...
    def left(self, subscription: Subscription) -> None: ...
