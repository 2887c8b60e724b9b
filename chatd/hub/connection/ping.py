"""A ping that the peer has not answered yet, and for how long the peer has been silent."""

from __future__ import annotations

from chatd.hub.connection.stream import PeerStream


class Ping:
    """A peer is silent since it last sent something or its TCP last acknowledged bytes before the ping's end.

    A ping queues behind the data that were sent before it. While the peer's TCP acknowledges some of these
    bytes the peer is alive, however slow its link is. After it has received the ping it has `timeout` seconds
    to answer. So both a peer that receives nothing and a peer that receives all but never answers are closed
    in time.
    """

    __slots__ = ("_end", "_since", "_stream", "_taken", "at")

    def __init__(self, stream: PeerStream, now: float) -> None:
        """To be created right after the ping was pushed."""
        self._stream, self.at = stream, now
        self._end, self._taken, self._since = stream.pushed(), stream.taken(), now

    @property
    def answered(self) -> bool:
        """Whether the peer has sent anything since: any message counts as an answer."""
        return self._stream.last_heard > self.at

    def silence(self, now: float) -> float:
        """Return the seconds for which the peer has been silent."""
        if self._taken < self._end:
            taken = self._stream.taken()
            if taken > self._taken:
                self._taken, self._since = taken, now
        return now - self._since
