"""The hub: accepts connections, knows who is connected, asks the silent for a sign of life, drains.

A connection serves itself (`connection.serve`); what it shares with the others is here.
"""

from __future__ import annotations

import ipaddress
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from urllib.parse import urlsplit

import structlog
import trio

from chatd import metrics
from chatd.chat import Chat
from chatd.chat.logins import check_standing
from chatd.config import Config
from chatd.errors import Close, Revoked
from chatd.hub import connection
from chatd.hub.connection import Connection, Handshake, Refused
from chatd.hub.fanout import Fanout
from chatd.hub.rooms import Rooms
from chatd.hub.session import Session
from chatd.limits import TokenBucket

PATH = "/ws"
TICK = 1.0  # seconds between looks at all connections
YIELD_EVERY = 500  # connections between checkpoints while looking: well below 1 ms
DRAIN_GRACE = 3.0  # seconds after the drain window for the last goodbyes

log = structlog.get_logger()


class User:
    """A user's connections on this node, and how much they may send together."""

    __slots__ = ("sends", "sessions")

    def __init__(self, sends: TokenBucket | None) -> None:
        self.sessions: set[Session] = set()
        self.sends = sends


class Hub:
    def __init__(self, config: Config, chat: Chat, rooms: Rooms, fanout: Fanout) -> None:
        self.config, self.chat, self.rooms, self.fanout = config, chat, rooms, fanout
        self.connections: dict[Connection, None] = {}
        self._users: dict[int, User] = {}
        self._addresses: Counter[str] = Counter()
        self._admitted = 0
        self._proxies = [ipaddress.ip_network(network) for network in config.limits.trusted_proxies]
        self._handshakes: TokenBucket | None = None
        self._accepting = trio.CancelScope()
        self._nursery: trio.Nursery
        self._draining = False

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until `drain`; the connections live in this nursery until they end or it is cancelled."""
        rate = self.config.limits.handshakes_per_second
        self._handshakes = TokenBucket(rate, 2 * rate, trio.current_time()) if rate else None
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._heartbeat)
            task_status.started()
            with self._accepting:
                await trio.serve_listeners(self._serve_one, listeners, handler_nursery=self._nursery)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        await connection.serve(self, stream)

    async def drain(self, window: float) -> None:
        """Stop accepting and send everybody away, each at a random moment of the window (seconds)."""
        self._draining = True
        self._accepting.cancel()
        started = trio.current_time()
        with trio.move_on_after(window + DRAIN_GRACE):
            leaving = sorted((started + random.uniform(0, window), id(c), c) for c in self.connections)
            for moment, _, one in leaving:
                await trio.sleep_until(moment)
                one.close_soon(Close.RESTART, "the server restarts")
            while self.connections:
                for one in list(self.connections):  # a handshake may have been on its way
                    one.close_soon(Close.RESTART, "the server restarts")
                await trio.sleep(0.02)

    # Who may connect. Synchronous: counted and decided in one step.

    def admit(self, handshake: Handshake, address: str) -> AbstractContextManager[None]:
        """Raises connection.Refused with the HTTP status."""
        limits = self.config.limits
        if handshake.path != PATH:
            raise Refused(404, "not_found")
        if handshake.origin is not None and not self._may_come_from(handshake.origin, handshake.host):
            raise Refused(403, "foreign_origin")
        if self._draining:
            raise Refused(503, "stopping")
        if limits.connections and self._admitted >= limits.connections:
            raise Refused(503, "too_many_connections")
        if limits.connections_per_address and self._addresses[address] >= limits.connections_per_address:
            raise Refused(503, "too_many_of_this_address")
        if self._handshakes is not None and self._handshakes.take(trio.current_time()):
            raise Refused(503, "too_many_handshakes")
        return self._admission(address)

    @contextmanager
    def _admission(self, address: str) -> Iterator[None]:
        self._admitted += 1
        self._addresses[address] += 1
        metrics.CONNECTIONS.inc()
        try:
            yield
        finally:
            metrics.CONNECTIONS.dec()
            self._admitted -= 1
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def _may_come_from(self, origin: str, host: str) -> bool:
        if self.config.hub.origins:
            return origin in self.config.hub.origins
        try:
            return urlsplit(origin).hostname == urlsplit(f"//{host}").hostname is not None
        except ValueError:
            return False

    def address_of(self, stream: trio.SocketStream, forwarded_for: str) -> str:
        """The peer's address; the one that a trusted proxy forwards for, if it is one."""
        peer = str(stream.socket.getpeername()[0])
        for claimed in reversed([part.strip() for part in forwarded_for.split(",") if part.strip()]):
            if not self._is_proxy(peer):
                break
            peer = claimed
        return peer

    def _is_proxy(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._proxies)

    # Who is connected.

    def register(self, session: Session) -> bool:
        """False when the user has too many connections already."""
        most = self.config.limits.connections_per_user
        user = self._users.get(session.user_id)
        if user is None:
            rate = self.config.limits.sends_per_second
            sends = TokenBucket(rate, 2 * rate, trio.current_time()) if rate else None
            user = self._users[session.user_id] = User(sends)
        if most and len(user.sessions) >= most:
            return False
        user.sessions.add(session)
        return True

    def forget(self, session: Session) -> None:
        user = self._users[session.user_id]
        user.sessions.discard(session)
        if not user.sessions:
            del self._users[session.user_id]

    def take_send(self, user_id: int) -> float:
        """0.0, or the seconds until this user may send again."""
        sends = self._users[user_id].sends
        return sends.take(trio.current_time()) if sends else 0.0

    # What is done for all of them.

    async def _heartbeat(self) -> None:
        interval, timeout = self.config.hub.ping_interval, self.config.hub.ping_timeout
        tick = min(TICK, interval / 4, timeout / 4)
        while True:
            await trio.sleep(tick)
            now = trio.current_time()
            for count, one in enumerate(list(self.connections), 1):
                one.beat(now, interval, timeout)
                if count % YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()

    async def check_standings(self) -> None:
        """End the connections of users whose tokens were revoked or who were banned. Part of the sweep."""
        users = list(self._users)
        for start in range(0, len(users), YIELD_EVERY):
            standings = await self.chat.logins.standings(users[start : start + YIELD_EVERY])
            for user_id, standing in standings.items():
                user = self._users.get(user_id)
                for session in list(user.sessions) if user else []:
                    try:
                        assert session.identity is not None
                        check_standing(session.identity, standing)
                    except Revoked as error:
                        session.close(Close.REVOKED, str(error))
