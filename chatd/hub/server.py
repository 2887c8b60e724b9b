"""The hub: accepts connections, asks the silent for a sign of life, sends everybody away when it drains.

A connection serves itself (`connection.serve`); who may come in is the registry's affair.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import trio

from chatd.core.errors import Close
from chatd.core.protocol import event, text_frame
from chatd.hub.connection import connection
from chatd.hub.connection.connection import Connection
from chatd.hub.services import Services
from chatd.net.gate import Gate
from chatd.net.lobby import SHARE

TICK = 1.0  # seconds between looks at all connections
YIELD_EVERY = 500  # connections between checkpoints while looking: well below 1 ms
DRAIN_RATE = 5000  # goodbyes a second at most: each is a login that another node, or this one, has to serve
HANDSHAKE_GRACE = 1.0  # seconds for handshakes that have begun; some peers connect and say nothing
DRAIN_GRACE = 3.0  # seconds after the drain window for the last goodbyes


class Hub:
    def __init__(self, services: Services) -> None:
        config = services.settings.now
        self._services = services
        self._hub, self._drain_window = config.hub, config.server.drain_window
        self.connections: dict[Connection, None] = {}
        self.ended = 0  # connections so far
        self._served = 0  # now, those in their handshake among them
        self._deserted = trio.Event()  # nobody is connected any more; for a drain
        self._accepting = trio.CancelScope()
        self._listeners: Sequence[trio.SocketListener] = ()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        slots: int,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until `drain`, as many as there are slots; the connections live in this nursery until they
        end or it is cancelled.
        """
        self._slots, self._listeners = trio.Semaphore(slots), listeners
        self._services.lobby.most = slots // SHARE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heartbeat)
            task_status.started()
            with self._accepting:
                gates = [
                    Gate(one, self._slots, lambda: len(self.connections), self._services.lobby)
                    for one in listeners
                ]
                await trio.serve_listeners(self._serve_one, gates, handler_nursery=nursery)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        self._served += 1
        try:
            await connection.serve(self._services, stream, self.connections)
        finally:
            self._served -= 1
            self.ended += 1
            if not self.connections:
                self._deserted.set()
            self._slots.release()

    def let_go(self) -> None:
        """Accept nobody any more, and leave the addresses to others."""
        self._accepting.cancel()
        for one in self._listeners:
            one.socket.close()

    def drain_window(self) -> float:
        """Seconds that `drain` takes: as configured, longer for very many."""
        return window_for(len(self.connections), self._drain_window)

    async def drain(self) -> None:
        """Stop accepting and ask everybody to move, in the first half of the window; send away who is still
        here, each at a random moment of the second.

        Who is in the middle of a handshake gets in, and is sent away like everybody: a refusal tells a browser
        nothing. Who comes later waits in the kernel's queue, or for another node.
        """
        self._accepting.cancel()
        self._deserted = trio.Event()
        started, window = trio.current_time(), self.drain_window()
        with trio.move_on_after(window + DRAIN_GRACE):
            leaving = list(self.connections)
            await self._ask_to_reconnect(leaving, window)
            moments = sorted(started + random.uniform(window / 2, window) for _ in leaving)
            for moment, one in zip(moments, leaving, strict=True):
                if one in self.connections:
                    with trio.move_on_at(moment):
                        await self._deserted.wait()
                    one.close_soon(Close.RESTART, "the server restarts")
            patience = trio.current_time() + HANDSHAKE_GRACE
            while self.connections or (self._served and trio.current_time() < patience):
                for one in list(self.connections):
                    one.close_soon(Close.RESTART, "the server restarts")
                await trio.sleep(0.02)

    @staticmethod
    async def _ask_to_reconnect(connections: Sequence[Connection], window: float) -> None:
        """Who has another node to go to is there before this one says goodbye."""
        delay, deadline = [0, round(window * 500)], round(window * 1000)
        frame = text_frame(event("reconnect", reason="restart", delay=delay, deadline_ms=deadline))
        for count, one in enumerate(connections, 1):
            one.tell(frame)
            if count % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()

    async def _heartbeat(self) -> None:
        interval, timeout = self._hub.ping_interval, self._hub.ping_timeout
        tick = min(TICK, interval / 4, timeout / 4)
        before = trio.current_time()
        while True:
            await trio.sleep(tick)
            now = trio.current_time()
            # Late: it was us who were away (a paused machine, say), so nobody's silence counts.
            late = now - before > tick + timeout / 2
            before = now
            for count, one in enumerate(list(self.connections), 1):
                if late:
                    one.excuse(now)
                one.beat(now, interval, timeout)
                if count % YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()


def window_for(connections: int, configured: float) -> float:
    """Seconds in which so many are sent away: each of them logs in again somewhere."""
    return max(configured, 2 * connections / DRAIN_RATE)
