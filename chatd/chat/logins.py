"""Who is it, and does that still count: a token is verified, then held against what the database says."""

from __future__ import annotations

from collections.abc import Iterable

from chatd.auth import Authenticator
from chatd.errors import Revoked
from chatd.model import Identity, now
from chatd.store import reads
from chatd.store.reader import Reader
from chatd.store.reads import Standing


class Logins:
    def __init__(self, authenticator: Authenticator, read: Reader) -> None:
        self.authenticator, self._read = authenticator, read

    async def verify(self, token: str) -> Identity:
        """What the token says. Raises Unauthorized, TokenExpired or Unavailable."""
        return await self.authenticator.authenticate(token)

    async def check(self, identity: Identity) -> None:
        """Whether it counts. Raises Revoked or Unavailable."""
        check_standing(identity, (await self.standings([identity.user_id])).get(identity.user_id))

    async def standings(self, user_ids: Iterable[int]) -> dict[int, Standing]:
        return await self._read(reads.standings, list(user_ids))


def check_standing(identity: Identity, standing: Standing | None) -> None:
    """Revocation outlives a restart. A token without `iat` counts as the oldest."""
    if standing is None:
        return
    if identity.issued_at < standing.valid_after:
        raise Revoked()
    if standing.banned_until is not None and standing.banned_until > now():
        raise Revoked("this user is banned", until=standing.banned_until)
