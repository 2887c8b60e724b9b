"""A ping that has not been answered yet, and how long its peer may still take."""

from __future__ import annotations

from chatd.hub.connection.send_queue import SendQueue


class Ping:
    """The peer's time runs from the last sign of life, and bytes that move are one.

    A ping waits behind the data that were sent before it. While the peer's TCP acknowledges some of them the
    peer is alive, however slow its link is; once it has the ping itself, it has `timeout` to answer. So a peer
    that takes nothing and a peer that takes everything and says nothing are both found in time.
    """

    __slots__ = ("_end", "_send_queue", "_since", "_taken", "at")

    def __init__(self, send_queue: SendQueue, now: float) -> None:
        """To be made right after the ping was pushed."""
        self._send_queue, self.at = send_queue, now
        self._end, self._taken, self._since = send_queue.pushed(), send_queue.taken(), now

    @property
    def answered(self) -> bool:
        """Whatever the peer has said since is an answer."""
        return self._send_queue.last_heard > self.at

    def silence(self, now: float) -> float:
        """Seconds since the last sign of life."""
        if self._taken < self._end:
            taken = self._send_queue.taken()
            if taken > self._taken:
                self._taken, self._since = taken, now
        return now - self._since
