"""The hub accepts connections, sends heartbeats to silent clients, and closes all connections when it drains.

`connection.serve` serves each connection. The registry decides which connections are admitted.
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

TICK = 1.0  # seconds between two heartbeat passes over all connections
YIELD_EVERY = 500  # connections between checkpoints of a heartbeat pass: well below 1 ms
DRAIN_RATE = 5000  # close frames a second at most: each client logs in again, at another node or this one
HANDSHAKE_GRACE = 1.0  # seconds for handshakes that have begun; some peers connect and send nothing
DRAIN_GRACE = 3.0  # seconds after the drain window for the last close frames


class Hub:
    def __init__(self, services: Services) -> None:
        config = services.settings.now
        self._services = services
        self._hub, self._drain_window = config.hub, config.server.drain_window
        self.connections: dict[Connection, None] = {}
        self.ended = 0  # connections that have ended since the start
        self._served = 0  # connections that are served now, including those in their handshake
        self._deserted = trio.Event()  # set when the last client has left; a drain waits for it
        self._accepting = trio.CancelScope()
        self._listeners: Sequence[trio.SocketListener] = ()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        slots: int,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept at most `slots` connections at once, until `drain`.

        The connections run in this function's nursery until they end or the nursery is cancelled.
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
        """Stop accepting and close the listeners, so that other processes can bind the addresses."""
        self._accepting.cancel()
        for one in self._listeners:
            one.socket.close()

    def drain_window(self) -> float:
        """Return the seconds that `drain` takes: the configured time, or more for very many connections."""
        return window_for(len(self.connections), self._drain_window)

    async def drain(self) -> None:
        """Stop accepting and ask all clients to reconnect in the first half of the window. In the second half,
        close each connection that is left at a random moment.

        A client in the middle of its handshake is admitted and closed like the others, because a browser does
        not show a page why a handshake was refused. A client that connects later waits in the kernel's queue
        or reaches another node.
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
        """A client that can reach another node has reconnected there before this node closes its connection."""
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
            # This process itself did not run for a while (the machine was paused, say), so it could not have
            # received the clients' answers: their silence does not count.
            late = now - before > tick + timeout / 2
            before = now
            for count, one in enumerate(list(self.connections), 1):
                if late:
                    one.excuse(now)
                one.beat(now, interval, timeout)
                if count % YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()


def window_for(connections: int, configured: float) -> float:
    """Return the seconds for closing so many connections: each of these clients logs in again somewhere."""
    return max(configured, 2 * connections / DRAIN_RATE)
