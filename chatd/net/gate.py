"""Accepts connections while there is a free place, and spreads them evenly over several workers."""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Callable

import trio

from chatd.net.lobby import Lobby
from chatd.net.polling import has
from chatd.observe import metrics

BACKLOG = 4096  # connections that the kernel queues during a burst

# Whether several workers accept from the same sockets. The kernel wakes all of them for each
# connection, and on an idle machine the same one may always be first: of 200 clients that
# came one by one, one of two workers got up to 185.
SHARED = "CHATD_WORKER_NUMBER" in os.environ
# So each worker waits a random time, in seconds, which is longer the more clients it has.
PAUSE_LEAST, PAUSE_EACH, PAUSE_MOST = 0.002, 0.000_01, 0.02
IN_A_ROW = 16  # connections accepted without a pause while more are waiting, as after a restart
LOOK = 0.05  # seconds between two checks for a free place


class Gate(trio.abc.Listener[trio.SocketStream]):
    """A listener that accepts a connection only if `slots` has a place. Others wait in the kernel's backlog.

    `crowd` returns the number of clients of this worker: workers with fewer clients accept sooner. `lobby` has
    the unknown connections, of which one is closed if there is no free place.
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
        """Accept a connection. The caller calls `slots.release()` when it has ended."""
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
        """If there is no place for the next connection, close a silent one."""
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
    """Whether a connection is waiting to be accepted."""
    return has(listening, select.POLLIN)


def hung_up(peer: trio.SocketStream) -> bool:
    """Whether the peer has closed its side of the connection already."""
    return has(peer.socket, select.POLLRDHUP)
