"""The login of a session: verifies the first token and later ones, and enters the rooms that a login names.

After a token was verified, one read of the database tells whether the login is valid and what its rooms' heads
are. Implements `registry.Guest`, so that the registry can end a login that is no longer valid.
"""

from __future__ import annotations

import math
import time
from typing import Any

import structlog
import trio

from chatd.core import protocol
from chatd.core.errors import (
    ChatError,
    Close,
    Final,
    Forbidden,
    Outdated,
    RateLimited,
    TooManyConnections,
    Unauthorized,
    Unavailable,
)
from chatd.core.model import Identity
from chatd.hub.admission.half_open import end_most_silent
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.refusals import close_for, refused
from chatd.hub.session.replies import tell_error
from chatd.hub.session.subscriptions import Subscriptions
from chatd.observe import metrics

log = structlog.get_logger()


class Login:
    """One session's login. `identity` is None until the first token was verified."""

    __slots__ = (
        "_address",
        "_chat",
        "_grace",
        "_line",
        "_rooms",
        "_services",
        "identity",
        "present",
        "user_id",
    )

    def __init__(self, services: Services, line: Line, rooms: Subscriptions, address: str) -> None:
        self._services, self._chat = services, services.chat
        self._line, self._rooms, self._address = line, rooms, address
        self._grace = services.settings.now.auth.expiry_grace
        self.present = False  # whether this session makes its user appear online
        self.identity: Identity | None = None
        self.user_id = 0

    # For the registry.

    @property
    def line(self) -> Line:
        return self._line

    def turn_away(self, error: ChatError) -> None:
        close = close_for(error)
        if isinstance(close, Final):
            self._line.close_for_good(close)
        else:
            self._line.close_soon(close, str(error))

    def subscription(self, conversation_id: int) -> Subscription | None:
        return self._rooms.get(conversation_id)

    # For the session.

    async def authenticate(self, command: protocol.Auth) -> None:
        """Log in and enter rooms, or refresh the token and enter more. Raises LOGIN_ERRORS, Forbidden."""
        identity = await self.verify(command.token)
        try:
            await self._come_in(command, identity)
        except Outdated as outdated:
            await self._come_in(command, await self._chat.logins.renew(command.token, outdated))
        self._services.registry.appear(self)  # after the check of bans: a banned user never appears online

    async def refresh(self, token: str, identity: Identity) -> Identity:
        """Replace the token by a new one of the same user. Raises LOGIN_ERRORS, Forbidden."""
        fresh = await self._chat.logins.checked(token, await self.verify(token))
        if fresh.user_id != identity.user_id:
            raise Forbidden("the new token is another user's", field="token")
        await self.become(fresh)
        return fresh

    def refuse(self, error: ChatError, ref: Any, *, first: bool) -> None:
        """Reply with an error and end the connection. A connection that is logged in stays open if the server
        just could not check the new token.
        """
        tell_error(self._line, error, ref)
        refused(error, conn=self._line.name, remote=self._address)
        if first or not isinstance(error, Unavailable):
            self.turn_away(error)

    def leave(self) -> None:
        if self.identity is not None:
            self._services.registry.forget(self)

    async def verify(self, token: str) -> Identity:
        """Verify a token. Raises LOGIN_ERRORS."""
        if self.identity is not None:  # the failures of others at the same address do not matter any more
            return await self._chat.logins.verify(token)
        # The token has arrived in time: the time that its verification takes does not count.
        self._line.close_at(math.inf, Close.NO_AUTH, "no auth in time")
        registry = self._services.registry
        failed_logins, guesser = registry.failed_logins, registry.guesser(self._address)
        try:
            async with failed_logins.turn(guesser):
                with self._line.our_turn():
                    identity = await self._chat.logins.verify(token)
            self._line.known()
            return identity
        except Unauthorized:
            if wait := failed_logins.failed(guesser):
                metrics.RATE_LIMITED.labels("logins").inc()
                raise RateLimited("too many failed logins from here", retry_after=round(wait, 3)) from None
            raise

    async def become(self, identity: Identity) -> None:
        """Take an identity, the first or a refreshed one. Raises TooManyConnections."""
        if self.identity is None:
            await self._register(identity.user_id)
            log.info("authenticated", conn=self._line.name, user_id=self.user_id, remote=self._address)
        self.identity = identity
        self._rooms.become(identity)
        # A token that was valid only by the leeway has expired: its client has the grace to send a new one.
        left = max(0.0, identity.expires_at - time.time()) + self._grace
        self._line.close_at(trio.current_time() + left, Close.TOKEN_EXPIRED, "the token has expired")

    async def _register(self, user_id: int) -> None:
        """Raises TooManyConnections."""
        self.user_id, registry = user_id, self._services.registry
        while not registry.register(self):
            if not await end_most_silent(registry.guests_of(user_id)):
                raise TooManyConnections

    async def _come_in(self, command: protocol.Auth, identity: Identity) -> None:
        if self.identity is not None and self.identity.user_id != identity.user_id:
            raise Forbidden("this connection belongs to another user", field="token")
        await self.become(identity)
        ready = {"user_id": self.user_id, "session": self._line.name, "expires_in": seconds_left(identity)}
        rooms = command.rooms or {}
        if rooms == "*":
            await self._rooms.enter_inbox(command.epoch, command.ref, **ready)
            return
        wanted = {id: protocol.position_of(rooms[id]) for id in self._rooms.fitting(rooms)}
        await self._rooms.enter_all(wanted, command.epoch, command.ref, **ready)
        if len(wanted) < len(rooms):
            self._line.nursery.start_soon(self._rooms.refuse, [id for id in rooms if id not in wanted])


def seconds_left(identity: Identity) -> int:
    return max(0, int(identity.expires_at - time.time()))
