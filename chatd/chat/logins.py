"""Who is it, and does that still count: a token is verified, then held against what the database says.

Whether a login is older than a revocation is known for certain where it says after which revocation it was made
(our own tokens, and what the backend said when it was asked again). Otherwise the token's `iat` has to tell, by
another clock and mostly in whole seconds. Where that leaves a doubt the client is sent for a new token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime

from chatd.auth import Authenticator
from chatd.config.settings import Settings
from chatd.core.errors import Final, NotYet, Outdated, Revoked
from chatd.core.model import Identity
from chatd.store.read import lookups
from chatd.store.read.lookups import Standing
from chatd.store.read.reader import Reader

SOON = 60.0  # seconds; a ban that ends within them is not told as one for good


class Logins:
    def __init__(self, authenticator: Authenticator, read: Reader, settings: Settings) -> None:
        self.authenticator, self._read, self._settings = authenticator, read, settings

    async def verify(self, token: str) -> Identity:
        """What the token says. Raises Unauthorized, TokenExpired or Unavailable."""
        return await self.authenticator.authenticate(token)

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """What its issuer says after a revocation. Raises as `verify` does, or `outdated`."""
        return await self.authenticator.renew(token, outdated)

    async def checked(self, token: str, identity: Identity) -> Identity:
        """The identity, if it counts, or what has become of it. Raises Revoked, Outdated, Unavailable …"""
        try:
            await self._check(identity)
        except Outdated as outdated:
            identity = await self.renew(token, outdated)
            await self._check(identity)
        return identity

    async def _check(self, identity: Identity) -> None:
        standings = await self.standings([identity.user_id])
        check_standing(identity, standings.get(identity.user_id), self._settings.now.auth.leeway)

    async def standings(self, user_ids: Iterable[int]) -> dict[int, Standing]:
        return await self._read(lookups.standings, list(user_ids))


def check_standing(identity: Identity, standing: Standing | None, leeway: float, *, live: bool = False) -> None:
    """Revocation outlives a restart. Raises Revoked, Outdated where nobody can tell, NotYet.

    `live`: the login counted when it was made, so what voids it now is later than its token.
    """
    if standing is None:
        return
    _check_ban(standing.banned_until)
    after = standing.valid_after
    if _is_later(identity, after, leeway):
        return
    if identity.asked:
        raise Outdated(after)
    if live or identity.after is not None or not identity.issued_at:
        raise Revoked(Final.REVOKED)
    # Whole seconds, and clocks that differ. If the revocation lies ahead, ours has stepped back since.
    if after - leeway - 1 <= identity.issued_at or after > time.time() + leeway + 1:
        raise Outdated(after)
    raise Revoked(Final.REVOKED)


def _is_later(identity: Identity, after: int, leeway: float) -> bool:
    if not after or (identity.after is not None and identity.after >= after):
        return True
    if identity.asked:  # by this node's clock, and the revocation by another's
        return identity.issued_at >= after + leeway
    # A token from the future would outlive every revocation.
    return after <= identity.issued_at <= max(time.time(), after) + leeway + 1


def _check_ban(until: str | None) -> None:
    if until is None:
        return
    left = datetime.fromisoformat(until).timestamp() - time.time()
    if left > SOON:
        raise Revoked(Final.BANNED, until=until)
    if left > 0:
        message = f"this user is banned for another {left:.0f} s"
        raise NotYet("the user's ban ends soon", message, retry_after=max(0.1, round(left, 3)))
