"""The registry admits connections and knows the sessions of each user. Each method counts and decides in one
synchronous step, so no two callers take the same last place.

A connection asks for admission; its session registers the user after the login.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

import trio
from msgspec import Struct

from chatd.chat.logins import check_standing
from chatd.chat.presence import USERS, Presence
from chatd.config import AllowedOrigins, Config, is_loopback, is_loopback_name
from chatd.config.settings import Settings
from chatd.core import addresses
from chatd.core.errors import ChatError, Close, Final
from chatd.core.limits import TokenBucket
from chatd.core.model import Identity
from chatd.hub.admission.failed_logins import FailedLogins
from chatd.hub.admission.handshake_rate import HandshakeRate
from chatd.hub.fanout.subscription import Subscription
from chatd.observe import metrics
from chatd.store.read.lookups import Standing

PATH = "/ws"


class Handshake(Struct, frozen=True):
    """What the registry and the session need of an upgrade request."""

    path: str
    query: dict[str, str]
    host: str
    origin: str | None
    bearer: str | None
    forwarded_for: str
    subprotocols: tuple[str, ...]

    @property
    def flat(self) -> bool:
        """Whether it is a trivial client's URL, `/ws?token=…&conversation_id=1`: it receives messages only."""
        return "token" in self.query


class Refused(Exception):
    """The handshake is refused: the client gets an HTTP status instead of a WebSocket."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Admission:
    """One place among the connections, counted until it is given back."""

    __slots__ = ("_address", "_registry")

    def __init__(self, registry: Registry, address: str) -> None:
        self._registry, self._address = registry, address

    def give_back(self) -> None:
        self._registry.give_back(self._address)


class Peer(Protocol):
    """The part of a connection that the registry uses; `services.Line` has the rest."""

    @property
    def ended(self) -> bool:
        """Whether a close frame is due or was sent."""

    def close_soon(self, code: Close, reason: str) -> None: ...
    def close_for_good(self, way: Final) -> None: ...
    def probe(self) -> None:
        """Send a ping now."""

    def silent_for(self, now: float) -> float:
        """Return the seconds that the peer has been silent since a ping; 0.0 if it has answered the ping."""


class Guest(Protocol):
    """The part of a session that the registry uses."""

    user_id: int
    identity: Identity | None
    present: bool  # whether this session makes its user appear online

    @property
    def line(self) -> Peer: ...

    def turn_away(self, error: ChatError) -> None:
        """Close the connection, because its login is no longer valid."""

    def subscription(self, conversation_id: int) -> Subscription | None: ...


class User:
    """A user's sessions on this node, and the rate of sends that they share."""

    __slots__ = ("guests", "sends")

    def __init__(self, sends: TokenBucket | None) -> None:
        self.guests: dict[Guest, float] = {}  # the value is the time of the login, by trio's clock
        self.sends = sends


class Registry:
    def __init__(self, settings: Settings, presence: Presence) -> None:
        self._presence = presence
        self._users: dict[int, User] = {}
        self.present = 0  # users with at least one session on this node
        self._addresses: Counter[str] = Counter()
        self._admitted = 0
        self.failed_logins = FailedLogins()
        settings.follow(self._apply)

    def _apply(self, config: Config) -> None:
        """Take new settings. All rates start full again. Connections that are open stay open even if they
        exceed a new limit.
        """
        self._limits, self._leeway, self._demo = config.limits, config.auth.leeway, config.demo
        self._origins = AllowedOrigins(config.hub.origins)
        self._proxies = [ipaddress.ip_network(network) for network in config.limits.trusted_proxies]
        self._handshake_rate = HandshakeRate(config.limits.handshakes_per_second)
        self.failed_logins.allow(config.limits.failed_logins_per_minute)
        for user in self._users.values():
            user.sends = _bucket(config.limits.sends_per_second)

    # Admission of connections.

    def admit(self, handshake: Handshake, address: str) -> Admission:
        """Admit a connection, or raise Refused. The caller must give the admission back."""
        limits, guesser, address = self._limits, self.guesser(address), addresses.counted_as(address)
        if handshake.path != PATH:
            raise Refused(404, "not_found")
        if self._demo and not is_loopback_name(handshake.host):
            raise Refused(403, "foreign_host")
        if handshake.origin is not None and not self._origins.allow(handshake.origin, handshake.host):
            raise Refused(403, "foreign_origin")
        if limits.connections and self._admitted >= limits.connections:
            raise Refused(503, "too_many_connections")
        if limits.connections_per_address and self._addresses[address] >= limits.connections_per_address:
            raise Refused(503, "too_many_of_this_address")
        if not self._handshake_rate.take(guesser):
            metrics.RATE_LIMITED.labels("handshakes").inc()
            raise Refused(503, "too_many_handshakes")
        self._admitted += 1
        self._addresses[address] += 1
        metrics.CONNECTING.inc()
        metrics.OPENED.inc()
        return Admission(self, address)

    def give_back(self, address: str) -> None:
        metrics.CONNECTING.dec()
        self._admitted -= 1
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]

    def address_of(self, peer: str, forwarded_for: str) -> str:
        """Return the client's address: the peer's, or the one that the peer forwards if it is a trusted
        proxy.
        """
        return addresses.client_of(peer, forwarded_for, self._proxies)

    def guesser(self, address: str) -> str | None:
        """Return the key under which failed logins of an address are counted. None for this machine and for
        trusted proxies, because many clients share these addresses.
        """
        if is_loopback(address) or addresses.is_in(addresses.parse(address), self._proxies):
            return None
        return addresses.counted_as(address)

    # Sessions of users.

    def register(self, guest: Guest) -> bool:
        """Add a session. Returns False if the user already has the maximum number of connections."""
        most = self._limits.connections_per_user
        user = self._users.get(guest.user_id)
        if user is None:
            user = self._users[guest.user_id] = User(_bucket(self._limits.sends_per_second))
        if most and len(user.guests) >= most and self._living(user.guests) >= most:
            return False
        self.present += not user.guests
        user.guests[guest] = trio.current_time()
        metrics.CONNECTING.dec()
        metrics.READY.inc()
        return True

    @staticmethod
    def _living(guests: Iterable[Guest]) -> int:
        return sum(not guest.line.ended for guest in guests)

    def judge(self, user_id: int, standing: Standing) -> None:
        """Close the sessions of a user whose tokens were revoked, or who was banned."""
        for guest in self.guests_of(user_id):
            assert guest.identity is not None
            try:
                check_standing(guest.identity, standing, self._leeway, live=True)
            except ChatError as error:
                guest.turn_away(error)

    def appear(self, guest: Guest) -> None:
        """Show the user as online. To be called when the database has confirmed that the login is valid."""
        if not guest.present:
            guest.present = True
            self._presence.arrive(USERS, guest.user_id)

    def forget(self, guest: Guest) -> None:
        user = self._users[guest.user_id]
        user.guests.pop(guest, None)
        self.present -= not user.guests
        metrics.READY.dec()
        metrics.CONNECTING.inc()  # until `give_back`
        if guest.present:
            guest.present = False
            self._presence.leave(USERS, guest.user_id)
        if not user.guests and not (user.sends and user.sends.used(trio.current_time())):
            del self._users[guest.user_id]

    def tidy(self) -> None:
        """Forget users who have left and whose rate has recovered. They are kept until then, so that a user
        cannot reset the rate by reconnecting.
        """
        now = trio.current_time()
        self.failed_logins.tidy()
        self._handshake_rate.tidy()
        for user_id, user in list(self._users.items()):
            if not user.guests and not (user.sends and user.sends.used(now)):
                del self._users[user_id]

    def take_send(self, user_id: int) -> float:
        """Count a send. Returns 0.0, or the seconds until this user may send again."""
        sends = self._users[user_id].sends
        return sends.take(trio.current_time()) if sends else 0.0

    def users(self) -> list[int]:
        return [user_id for user_id, user in self._users.items() if user.guests]

    def guests_of(self, user_id: int, *, before: float = math.inf) -> list[Guest]:
        """Return the user's sessions that logged in no later than `before` (trio's clock)."""
        user = self._users.get(user_id)
        return [guest for guest, since in user.guests.items() if since <= before] if user else []

    def subscriptions_of(self, user_ids: Iterable[int], conversation_id: int) -> Iterator[Subscription]:
        """Yield the subscriptions to this conversation that these users' sessions have."""
        for user_id in user_ids:
            for guest in self.guests_of(user_id):
                if subscription := guest.subscription(conversation_id):
                    yield subscription


def _bucket(rate: int) -> TokenBucket | None:
    """Return a bucket with a burst of twice the rate; None if there is no limit (0)."""
    return TokenBucket(rate, 2 * rate, trio.current_time()) if rate else None
