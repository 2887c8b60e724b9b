"""Who is it? `Authenticator` is what the use cases know.

tokens      verifies JWTs by itself, with secrets, key files or the keys of a `keyserver`
backend     asks the backend instead
"""

from __future__ import annotations

from typing import Protocol

from chatd.core.errors import Outdated
from chatd.core.model import Identity


class Authenticator(Protocol):
    async def authenticate(self, token: str) -> Identity:
        """Raises Unauthorized or TokenExpired; NotYet for a token that counts in a moment, Unavailable where
        the answer should come from elsewhere.
        """

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """Look again whether the token counts after a revocation. Raises as `authenticate` does, and `outdated`
        where the token itself is all there is to look at.
        """
