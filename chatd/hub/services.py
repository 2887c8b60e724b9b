"""What the parts of the hub share: `Services` for all sessions, `Line` for one."""

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
        """A goodbye is due, or was said."""

    async def next_message(self) -> str | bytes:
        """Raises ConnectionClosed of the library: the session does not look at it."""

    def push(self, frames: bytes) -> None: ...
    def reply(self, frames: bytes) -> None:
        """Push an answer: also after the goodbye was decided, until it is said."""

    def try_push(self, frames: bytes) -> bool:
        """Push what can be read again later. False, and nothing is pushed, where too much waits."""

    def offer(self, frames: bytes) -> bool:
        """Push what may be left out, for a peer that reads too slowly. False where it is."""

    def unhurried(self) -> AbstractAsyncContextManager[None]:
        """A block for a long answer: one at a time, and not before the peer has read most of what it has."""

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was pushed."""

    def our_turn(self) -> AbstractContextManager[None]:
        """A block in which a peer that is not known yet waits for us, and is not silent."""

    def known(self) -> None:
        """The peer has brought a valid token: it does not make room for others any more."""

    def close_soon(self, code: Close, reason: str) -> None:
        """Say goodbye to a client that may come back."""

    def close_for_good(self, way: Final) -> None:
        """Say goodbye to a client that stops then: what is final is in `Final`, and nothing else."""

    def probe(self) -> None:
        """Ask for a sign of life now."""

    def silent_for(self, now: float) -> float:
        """Seconds without a sign of life since it was asked for one; 0.0 if it has given it."""

    def answered(self) -> None:
        """The peer's pong has come."""

    def close_at(self, deadline: float, code: Close, reason: str) -> None:
        """Say this goodbye at a moment of trio's clock, unless told otherwise before."""
