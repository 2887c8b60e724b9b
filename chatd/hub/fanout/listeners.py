"""What a room needs of the sessions that hear it, and who else hears of its subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from chatd.hub.fanout.rooms import Subscription


class Listener(Protocol):
    """What a subscription needs of its session."""

    user_id: int
    flat: bool

    def push(self, frames: bytes) -> None: ...
    def try_push(self, frames: bytes) -> bool:
        """Push what can be read again later. False where the connection has no room for it."""

    def offer(self, frames: bytes) -> bool:
        """Push what may be left out. False where it is."""

    def resync(self, subscription: Subscription) -> None:
        """Read the room anew for this subscription and answer unasked."""

    def fall_behind(self, subscription: Subscription) -> None:
        """Read what follows its cursor from the database, as the client takes it, until it is live again."""

    def dropped(self, subscription: Subscription) -> None:
        """The subscription was ended by the server."""


class Watcher(Protocol):
    """Hears of subscriptions, synchronously, after the room has them or has lost them."""

    def joined(self, subscription: Subscription) -> None: ...
    def left(self, subscription: Subscription) -> None: ...
