"""Connections of those whom nobody knows yet: they have a share of the places, and make room for who comes.

Who is silent longest goes first, at once if one address holds many of the places, and after a moment's grace if
not. So whoever comes and says who it is gets in, however many hold connections open and say nothing. Nobody is
silent while it waits for us.
"""

from __future__ import annotations

import select
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import trio

from chatd.config import is_loopback
from chatd.core.addresses import counted_as
from chatd.observe import metrics
from chatd.observe.logs import Recurring

SHARE = 2  # one in so many places is for those whom nobody knows yet
ADDRESS_SHARE = 4  # one in so many of these may be one address's, when they are all taken
GRACE = 0.5  # seconds in which a peer says something, on a slow link too
LOOKED_AT = 50  # of those who may have to go


class Stay:
    """One connection that is not known yet. `key`: whose address; empty: nobody's own."""

    __slots__ = ("_lobby", "end", "key", "ours", "since", "stream")

    def __init__(self, lobby: Lobby, stream: trio.SocketStream, key: str, end: Callable[[], None]) -> None:
        """`end` ends the connection: synchronous."""
        self._lobby, self.stream, self.key, self.end = lobby, stream, key, end
        self.ours = False  # it is our turn: we work on what it has said
        self.enter(key)

    def enter(self, key: str) -> None:
        """Again for somebody else: a proxy has said whose it is."""
        self.leave()
        self.key, self.since = key, trio.current_time()
        self._lobby.note(self)

    def leave(self) -> None:
        """It is known, or has ended. Does nothing the second time."""
        self._lobby.forget(self)

    @contextmanager
    def our_turn(self) -> Iterator[None]:
        """A block that works on what the peer has said. How long it takes is not the peer's fault."""
        self.ours = True
        try:
            yield
        finally:
            self.ours = False
            if self in self._lobby:
                self.enter(self.key)  # from here on it has its own time

    @contextmanager
    def their_turn(self) -> Iterator[None]:
        """A block within the other that waits for the peer, which has to say more or to read what we say."""
        before, self.ours = self.ours, False
        try:
            yield
        finally:
            self.ours = before

    @property
    def silent(self) -> bool:
        """Whether it is the peer's turn: nothing of it waits to be read by us, and we work on nothing."""
        if self.ours:
            return False
        look = select.poll()
        look.register(self.stream.socket.fileno(), select.POLLIN)
        return not look.poll(0)


class Lobby:
    """`most` places. `port` is for the operator: `hub` or `api`."""

    def __init__(self, port: str, most: int = 1) -> None:
        self.most, self._port = most, port
        self._told = Recurring("unknown_connections_ended")
        self._all: OrderedDict[Stay, None] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Stay, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, stay: Stay) -> bool:
        return stay in self._all

    @property
    def full(self) -> bool:
        return len(self._all) >= self.most

    @property
    def overfull(self) -> bool:
        """For who lets in more than there are places."""
        return 2 * len(self._all) >= 3 * self.most

    def note(self, stay: Stay) -> None:
        self._all[stay] = None
        self._by_address.setdefault(stay.key, OrderedDict())[stay] = None

    def forget(self, stay: Stay) -> None:
        if stay not in self._all:
            return
        del self._all[stay]
        mine = self._by_address[stay.key]
        del mine[stay]
        if not mine:
            del self._by_address[stay.key]

    def make_room(self, *, hurry: bool = False) -> bool:
        """End one; False where everybody still has time. In a `hurry` only those have whom we work on."""
        stay = self._of_a_crowd() or self._overdue() or (self._oldest_idle() if hurry else None)
        if stay is None:
            return False
        self.forget(stay)
        stay.end()
        self.count_ended()
        return True

    def count_ended(self) -> None:
        """Somebody had to go, or did not come in."""
        metrics.UNKNOWN_ENDED.labels(self._port).inc()
        self._told.warn(port=self._port, places=self.most)

    def _of_a_crowd(self) -> Stay | None:
        """One of the address that holds too many."""
        crowds = (mine for key, mine in self._by_address.items() if key)
        mine = max(crowds, key=len, default=None)
        if mine is None or len(mine) * ADDRESS_SHARE < self.most:
            return None
        looked_at = list(islice(mine, LOOKED_AT))
        idle = next((stay for stay in looked_at if stay.silent), None)
        slow = next((stay for stay in looked_at if not stay.ours), None)
        return idle or slow or next(reversed(mine))  # we work on all: those before the last get done

    def _overdue(self) -> Stay | None:
        late = trio.current_time() - GRACE
        return next((one for one in islice(self._all, LOOKED_AT) if one.since < late and one.silent), None)

    def _oldest_idle(self) -> Stay | None:
        return next((stay for stay in self._all if not stay.ours), None)


def key_of(peer: trio.SocketStream) -> str:
    """The address of a stay. Empty where it may be everybody's, as a proxy's on this machine is."""
    try:
        address = str(peer.socket.getpeername()[0])
    except OSError:
        return ""
    return "" if is_loopback(address) else counted_as(address)
