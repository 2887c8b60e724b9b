"""Who is it? `Authenticator` is what the use cases know.

tokens      verifies JWTs by itself, with secrets, key files or the keys of a `keyserver`
backend     asks the backend instead
"""

from __future__ import annotations

from typing import Protocol

from chatd.model import Identity


class Authenticator(Protocol):
    async def authenticate(self, token: str) -> Identity:
        """Raises Unauthorized or TokenExpired; Unavailable where the answer should come from elsewhere."""
