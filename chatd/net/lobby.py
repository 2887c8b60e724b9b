"""Connections of those whom nobody knows yet: they have a share of the places, and make room for who comes.

Who is silent longest goes first, at once if one address holds many of the places, and after a moment's grace if
not. So whoever comes and says who it is gets in, however many hold connections open and say nothing. Nobody is
silent while it waits for us.

While an address holds many that say nothing, only some of its newcomers are let in, of those who speak at once,
and the others are closed. A handshake takes time, and who comes from elsewhere would wait for all of theirs.
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
from chatd.observe import metrics
from chatd.observe.logs import Recurring

SHARE = 2  # one in so many places is for those whom nobody knows yet
ADDRESS_SHARE = 4  # one in so many of these may be one address's, when they are all taken
GRACE = 0.5  # seconds in which a peer says something, on a slow link too
LOOKED_AT = 50  # of those who may have to go
NEARLY = 7 / 8  # of the places: from here on newcomers of a crowd are turned away
NEWCOMER = 0.01  # seconds from one that is let in all the same to the next, for there may be honest ones


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
        return not self.ours and is_silent(self.stream)


class Lobby:
    """`most` places. `port` is for the operator: `hub` or `api`."""

    def __init__(self, port: str, most: int = 1) -> None:
        self.most, self._port = most, port
        self._told = Recurring("unknown_connections_ended")
        self._all: OrderedDict[Stay, None] = OrderedDict()
        self._by_address: dict[str, OrderedDict[Stay, None]] = {}
        self._next_newcomer = 0.0  # when one more of a crowd may come in

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

    def turns_away(self, peer: trio.SocketStream) -> bool:
        """Whether a newcomer is one too many of its address."""
        key = key_of(peer)
        mine = self._by_address.get(key)
        if not key or mine is None or len(self._all) < NEARLY * self.most or not self._is_crowd(mine):
            return False
        now, oldest = trio.current_time(), next(iter(mine))
        if oldest.since > now - GRACE or not oldest.silent:
            return False  # they are many, but they may all be honest
        if now < self._next_newcomer or is_silent(peer):
            return True
        # So seldom that each of them has its moment before it is the oldest.
        self._next_newcomer = now + max(NEWCOMER, 2 * GRACE / len(mine))
        return False

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
        if mine is None or not self._is_crowd(mine):
            return None
        looked_at = list(islice(mine, LOOKED_AT))
        idle = next((stay for stay in looked_at if stay.silent), None)
        slow = next((stay for stay in looked_at if not stay.ours), None)
        return idle or slow or next(reversed(mine))  # we work on all: those before the last get done

    def _is_crowd(self, mine: Sized) -> bool:
        return len(mine) * ADDRESS_SHARE >= self.most

    def _overdue(self) -> Stay | None:
        late = trio.current_time() - GRACE
        return next((one for one in islice(self._all, LOOKED_AT) if one.since < late and one.silent), None)

    def _oldest_idle(self) -> Stay | None:
        return next((stay for stay in self._all if not stay.ours), None)


def is_silent(peer: trio.SocketStream) -> bool:
    """Whether nothing of it is there to be read."""
    look = select.poll()
    look.register(peer.socket.fileno(), select.POLLIN)
    return not look.poll(0)


def key_of(peer: trio.SocketStream) -> str:
    """The address of a stay. Empty where it may be everybody's, as a proxy's on this machine is."""
    try:
        address = str(peer.socket.getpeername()[0])
    except OSError:
        return ""
    return "" if is_loopback(address) else counted_as(address)
