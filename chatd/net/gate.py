"""Accepts connections while there is room for them, and shares them fairly among several workers."""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Callable

import trio

from chatd.net.lobby import Lobby
from chatd.observe import metrics

BACKLOG = 4096  # connections the kernel holds while a burst is accepted

# Whether other processes accept from the same sockets. The kernel wakes all of them for each connection, and on
# an idle machine one may always be first: of 200 clients that came one by one, one of two had up to 185.
SHARED = "CHATD_WORKER_NUMBER" in os.environ
# So each lets a random while pass, a longer one the more clients it has; seconds.
PAUSE_LEAST, PAUSE_EACH, PAUSE_MOST = 0.002, 0.000_01, 0.02
IN_A_ROW = 16  # connections that are accepted without a pause where more wait than one: many come back at once
LOOK = 0.05  # seconds between looks for a place, where there is none


class Gate(trio.abc.Listener[trio.SocketStream]):
    """A listener with room for so many connections. Beyond it the others wait in the kernel's backlog.

    `crowd` tells how many clients there are, so that of several workers the one with few is the first. In the
    `lobby` are those who make room for others.
    """

    def __init__(
        self,
        listener: trio.SocketListener,
        slots: trio.Semaphore,
        crowd: Callable[[], int] = lambda: 0,
        lobby: Lobby | None = None,
    ) -> None:
        self._listener, self._slots, self._crowd, self._lobby = listener, slots, crowd, lobby
        self._in_a_row = IN_A_ROW

    async def accept(self) -> trio.SocketStream:
        """The caller gives the place back with `slots.release()` when the connection has ended."""
        if self._lobby is not None:
            await self._make_room(self._lobby)
        await self._slots.acquire()
        try:
            while True:
                if SHARED:
                    await self._wait_for_turn()
                peer = await self._listener.accept()
                if not self._turns_away(peer):
                    return peer
                peer.socket.close()
        except BaseException:
            self._slots.release()
            raise

    def _turns_away(self, peer: trio.SocketStream) -> bool:
        if hung_up(peer):
            metrics.FAILED.inc()
            return True
        if self._lobby is not None and self._lobby.turns_away(peer):
            self._lobby.count_ended()
            return True
        return False

    async def _make_room(self, lobby: Lobby) -> None:
        """Where there is none for who comes next, one of those who say nothing goes."""
        while lobby.full or not self._slots.value:
            await trio.lowlevel.wait_readable(self._listener.socket)
            if lobby.make_room():
                return
            await trio.sleep(LOOK)

    async def _wait_for_turn(self) -> None:
        while self._in_a_row >= IN_A_ROW or not somebody_waits(self._listener.socket):
            await trio.lowlevel.wait_readable(self._listener.socket)
            pause = min(PAUSE_LEAST + PAUSE_EACH * self._crowd(), PAUSE_MOST)
            await trio.sleep(random.uniform(0, pause))
            self._in_a_row = 0
        self._in_a_row += 1

    async def aclose(self) -> None:
        await self._listener.aclose()


def somebody_waits(listening: trio.socket.SocketType | socket.socket) -> bool:
    """Whether a connection is there to be accepted."""
    look = select.poll()
    look.register(listening.fileno(), select.POLLIN)
    return bool(look.poll(0))


def hung_up(peer: trio.SocketStream) -> bool:
    """Whether it has gone, or says nothing more, before anybody has answered it."""
    look = select.poll()
    look.register(peer.socket.fileno(), select.POLLRDHUP)
    return bool(look.poll(0))
