"""Finds the user that a token belongs to. The use cases know only `Authenticator`.

tokens              verifies JWTs with secrets, key files or the keys of a `keyserver`
backend.auth_callback   asks the backend instead
"""

from __future__ import annotations

from typing import Protocol

from chatd.core.errors import Outdated
from chatd.core.model import Identity


class Authenticator(Protocol):
    async def authenticate(self, token: str) -> Identity:
        """The identity that a token proves.

        Raises Unauthorized; TokenExpired; NotYet if the token becomes valid in a moment; Unavailable if the
        backend or a key server does not answer.
        """

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """Check a token again after a revocation.

        Raises the errors of `authenticate`, and `outdated` if there is nothing to check but the token itself.
        """
