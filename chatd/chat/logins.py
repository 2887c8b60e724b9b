"""Verifies a token, and checks in the database whether the login was revoked or the user banned.

chatd knows for certain whether a login is later than a revocation if the login names the revocation that it
follows: chatd's own tokens do, and so do the backend's answers. For other tokens only `iat` tells, by another
clock and mostly in whole seconds. If that leaves a doubt, the client has to get a new token.
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

SOON = 60.0  # seconds; a ban that ends within this time is reported as temporary


class Logins:
    def __init__(self, authenticator: Authenticator, read: Reader, settings: Settings) -> None:
        self.authenticator, self._read, self._settings = authenticator, read, settings

    async def verify(self, token: str) -> Identity:
        """The identity that the token proves. Raises Unauthorized, TokenExpired or Unavailable."""
        return await self.authenticator.authenticate(token)

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """Ask the issuer again after a revocation.

        Raises the errors of `verify`; `outdated` if nobody can be asked.
        """
        return await self.authenticator.renew(token, outdated)

    async def checked(self, token: str, identity: Identity) -> Identity:
        """The identity if the login is valid, renewed if need be.

        Raises Revoked, Outdated, NotYet, Unavailable.
        """
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
    """Check a login against the user's restrictions in the database; `leeway` is in seconds.

    `live`: the login was valid before, so a revocation that makes it void now is later than its token. Raises
    Revoked; Outdated if the order of token and revocation is uncertain; NotYet if a ban ends soon.
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
    # Times are in whole seconds and clocks differ. If the revocation is in the future, our
    # clock was set back since.
    if after - leeway - 1 <= identity.issued_at or after > time.time() + leeway + 1:
        raise Outdated(after)
    raise Revoked(Final.REVOKED)


def _is_later(identity: Identity, after: int, leeway: float) -> bool:
    if not after or (identity.after is not None and identity.after >= after):
        return True
    if identity.asked:  # `issued_at` is by this node's clock, `after` perhaps by another's
        return identity.issued_at >= after + leeway
    # Without the upper bound, a token with a time in the future would survive every revocation.
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
