"""The lobby: connections that have not authenticated yet. They have a share of all places, and when it is full,
one of them is closed for each new connection.

The connection that has been silent for longest is closed first: at once if its address holds many of the
places, otherwise after a grace period. So a client that connects and sends its token gets in, however many
others hold connections open and send nothing. A connection does not count as silent while chatd works on what
it has sent.

While an address holds many silent connections, chatd accepts only some of its new ones, from among those that
send data at once, and closes the others. Handshakes take time, and clients from other addresses would have to
wait for all of them.
"""

from __future__ import annotations

import select
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice

import trio

from chatd.config import is_loopback
from chatd.core.addresses import counted_as
from chatd.net.polling import has
from chatd.observe import metrics
from chatd.observe.logs import Recurring

SHARE = 2  # one in this many places is for unknown connections
ADDRESS_SHARE = 4  # an address with one in this many of these places is a crowd
GRACE = 0.5  # seconds within which an honest peer sends something, even on a slow link
LOOKED_AT = 50  # connections to examine when one has to be closed
NEARLY = 7 / 8  # share of the places from which on new connections of a crowd are turned away
NEWCOMER = 0.01  # least seconds between two connections of a crowd that are accepted, as they may be honest


class Stay:
    """One connection in the lobby.

    `key`: its address as limits count it; empty: shared by many, as a proxy's is.
    """

    __slots__ = ("_lobby", "end", "key", "ours", "since", "stream")

    def __init__(self, lobby: Lobby, stream: trio.SocketStream, key: str, end: Callable[[], None]) -> None:
        """`end` closes the connection, synchronously."""
        self._lobby, self.stream, self.key, self.end = lobby, stream, key, end
        self.ours = False  # it is chatd's turn: chatd works on what the peer has sent
        self.enter(key)

    def enter(self, key: str) -> None:
        """Enter the lobby, or enter again under another address, when a proxy has named the client's."""
        self.leave()
        self.key, self.since = key, trio.current_time()
        self._lobby.note(self)

    def leave(self) -> None:
        """Leave the lobby, because the client is known or the connection has ended.

        A second call does nothing.
        """
        self._lobby.forget(self)

    @contextmanager
    def our_turn(self) -> Iterator[None]:
        """A block in which chatd works on what the peer has sent.

        Its time does not count as the peer's silence.
        """
        self.ours = True
        try:
            yield
        finally:
            self.ours = False
            if self in self._lobby:
                self.enter(self.key)  # the peer's time starts again

    @contextmanager
    def their_turn(self) -> Iterator[None]:
        """A block within `our_turn` that waits for the peer to send more data or to read chatd's answer."""
        before, self.ours = self.ours, False
        try:
            yield
        finally:
            self.ours = before

    @property
    def silent(self) -> bool:
        """Whether chatd waits for the peer, which has sent nothing that chatd still has to read or work on."""
        return not self.ours and is_silent(self.stream)


class Lobby:
    """The unknown connections of one port, with `most` places.

    `port`, `hub` or `api`, is for logs and metrics.
    """

    def __init__(self, port: str, most: int = 1) -> None:
        self._most, self._port = most, port
        self._log = Recurring("unknown_connections_ended")
        self._all: OrderedDict[Stay, None] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Stay, None]] = {}
        self._crowds: set[str] = set()  # addresses that hold too many, of perhaps 100,000
        self._next_newcomer = 0.0  # when the next connection of a crowd may be accepted

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, stay: Stay) -> bool:
        return stay in self._all

    @property
    def most(self) -> int:
        return self._most

    @most.setter
    def most(self, most: int) -> None:
        self._most = most
        self._crowds = {key for key, mine in self._by_address.items() if key and self._is_crowd(mine)}

    @property
    def full(self) -> bool:
        return len(self._all) >= self.most

    @property
    def overfull(self) -> bool:
        """Whether there are half as many connections again as places, for a caller that
        accepts more than `most`.
        """
        return 2 * len(self._all) >= 3 * self.most

    def note(self, stay: Stay) -> None:
        self._all[stay] = None
        mine = self._by_address.setdefault(stay.key, OrderedDict())
        mine[stay] = None
        if stay.key and self._is_crowd(mine):
            self._crowds.add(stay.key)

    def forget(self, stay: Stay) -> None:
        if stay not in self._all:
            return
        del self._all[stay]
        mine = self._by_address[stay.key]
        del mine[stay]
        if not mine:
            del self._by_address[stay.key]
        if not mine or not self._is_crowd(mine):
            self._crowds.discard(stay.key)

    def turns_away(self, peer: trio.SocketStream) -> bool:
        """Whether to close a new connection because its address holds too many silent ones."""
        key = key_of(peer)
        mine = self._by_address.get(key)
        if not key or mine is None or len(self._all) < NEARLY * self.most or not self._is_crowd(mine):
            return False
        now, oldest = trio.current_time(), next(iter(mine))
        if oldest.since > now - GRACE or not oldest.silent:
            return False  # there are many, but all may be honest
        if now < self._next_newcomer or is_silent(peer):
            return True
        # Accept so few that each gets its grace period before it is the oldest.
        self._next_newcomer = now + max(NEWCOMER, 2 * GRACE / len(mine))
        return False

    def make_room(self, *, hurry: bool = False) -> bool:
        """Close one connection. False: all are within their grace period.

        With `hurry` there is no grace period, and only connections on which chatd is working are safe.
        """
        stay = self._of_a_crowd() or self._overdue() or (self._oldest_idle() if hurry else None)
        if stay is None:
            return False
        self.forget(stay)
        stay.end()
        self.count_ended()
        return True

    def count_ended(self) -> None:
        """Count and log a connection that was closed, or was not accepted."""
        metrics.UNKNOWN_ENDED.labels(self._port).inc()
        self._log.warn(port=self._port, places=self.most)

    def _of_a_crowd(self) -> Stay | None:
        """A connection to close of the address that holds too many; None if there is no such address."""
        mine = max((self._by_address[key] for key in self._crowds), key=len, default=None)
        if mine is None:
            return None
        looked_at = list(islice(mine, LOOKED_AT))
        idle = next((stay for stay in looked_at if stay.silent), None)
        slow = next((stay for stay in looked_at if not stay.ours), None)
        return idle or slow or next(reversed(mine))  # chatd works on all of them: close the newest

    def _is_crowd(self, mine: Sized) -> bool:
        return len(mine) * ADDRESS_SHARE >= self.most

    def _overdue(self) -> Stay | None:
        late = trio.current_time() - GRACE
        return next((one for one in islice(self._all, LOOKED_AT) if one.since < late and one.silent), None)

    def _oldest_idle(self) -> Stay | None:
        return next((stay for stay in self._all if not stay.ours), None)


def is_silent(peer: trio.SocketStream) -> bool:
    """Whether the peer has sent nothing that is still unread."""
    return not has(peer.socket, select.POLLIN)


def key_of(peer: trio.SocketStream) -> str:
    """The key of a peer's address.

    Empty for a loopback address, which many clients behind a proxy may share.
    """
    try:
        address = str(peer.socket.getpeername()[0])
    except OSError:
        return ""
    return "" if is_loopback(address) else counted_as(address)
