"""What the parts of the hub share: all sessions share one `Services`, and each session has its own `Line`."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from chatd.chat.chat import Chat
from chatd.config.settings import Settings
from chatd.core.errors import Close, Final
from chatd.hub.admission.registry import Registry
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.queue import FanoutQueue
from chatd.hub.fanout.rooms import Rooms
from chatd.hub.fanout.sweep import Sweep
from chatd.hub.presence.audience import Audiences
from chatd.net.lobby import Lobby


@dataclass(frozen=True)
class Services:
    settings: Settings
    chat: Chat
    rooms: Rooms
    fanout: Fanout
    queue: FanoutQueue
    sweep: Sweep
    registry: Registry
    audiences: Audiences
    lobby: Lobby


class Line(Protocol):
    """A session's connection, as the session sees it. Only `next_message` and `unhurried` wait."""

    name: str
    nursery: trio.Nursery  # ends with the connection

    @property
    def ended(self) -> bool:
        """Whether a close frame is due or was sent."""

    async def next_message(self) -> str | bytes:
        """Wait for the client's next message. Raises the library's ConnectionClosed, which the session does
        not catch.
        """

    def push(self, frames: bytes) -> None: ...
    def reply(self, frames: bytes) -> None:
        """Push the reply to a command, unless a close frame was already sent."""

    def try_push(self, frames: bytes) -> bool:
        """Push frames that can be read again later. Returns False and pushes nothing if too much is queued."""

    def offer(self, frames: bytes) -> bool:
        """Push frames that a slow consumer can do without. Returns False if they were dropped for that."""

    def unhurried(self) -> AbstractAsyncContextManager[None]:
        """A block that sends a long answer. A connection runs one such block at a time, and each begins only
        when the peer has read most of what was queued.
        """

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was pushed."""

    def our_turn(self) -> AbstractContextManager[None]:
        """A block in which an unauthenticated peer waits for the server, so that it does not count as
        silent.
        """

    def known(self) -> None:
        """The peer has sent a valid token: from now on it is not closed to make room for new connections."""

    def close_soon(self, code: Close, reason: str) -> None:
        """Send a close frame, soon, to a client that may reconnect."""

    def close_for_good(self, way: Final) -> None:
        """Send a close frame, soon, after which the client does not reconnect. `Final` lists all such codes."""

    def probe(self) -> None:
        """Send a ping now."""

    def silent_for(self, now: float) -> float:
        """Return the seconds that the peer has been silent since a ping; 0.0 if it has answered the ping."""

    def answered(self) -> None:
        """The peer's pong has arrived."""

    def close_at(self, deadline: float, code: Close, reason: str) -> None:
        """Send this close frame at `deadline` (trio's clock), unless a later call moves the deadline."""
