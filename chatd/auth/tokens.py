"""JWTs, HS256 with the current and the previous secret: issued for backends, verified for connections.

Revocation is not here: a token says who somebody is, the database whether that still counts.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from typing import Any

import jwt

from chatd.errors import TokenExpired, Unauthorized
from chatd.limits import MAX_ID
from chatd.model import Identity

_ALGORITHM = "HS256"
# `sub` may be an integer, which PyJWT's own check refuses. A clock ahead of ours issues nothing wrong.
_OPTIONS: Any = {"require": ["sub", "exp"], "verify_sub": False, "verify_iat": False, "verify_aud": False}
MAX_TOKEN_CHARS = 8192  # longer is no token of ours, and is not looked into


class Tokens:
    """Implements `auth.Authenticator`."""

    def __init__(self, secret: str, previous_secret: str = "") -> None:
        self._secret = secret
        # As prepared keys: a secret that comes as text is looked at anew, for what it might be, at each token.
        self._keys = [_key(one) for one in (secret, previous_secret) if one]

    def issue(
        self, user_id: int, ttl: int, conversations: Iterable[int] | None = None, *, since: int = 0
    ) -> str:
        """A token for a user that lives `ttl` seconds. `since`: the earliest `iat` that counts, in seconds."""
        now = int(time.time())
        now = since if since == now + 1 else now
        claims: dict[str, Any] = {"sub": str(user_id), "iat": now, "exp": now + ttl}
        if conversations is not None:
            claims["conversations"] = sorted(conversations)
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)

    async def authenticate(self, token: str) -> Identity:
        return self.verify(token)

    def verify(self, token: str) -> Identity:
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized("this token is not valid")
        return _identity(self._claims(token))

    def _claims(self, token: str) -> dict[str, Any]:
        for key in self._keys:
            try:
                return jwt.decode(token, key, algorithms=[_ALGORITHM], options=_OPTIONS)
            except jwt.ExpiredSignatureError:
                raise TokenExpired() from None
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
                break
        raise Unauthorized("this token is not valid")


def _key(secret: str) -> jwt.PyJWK:
    encoded = base64.urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()
    return jwt.PyJWK.from_dict({"kty": "oct", "alg": _ALGORITHM, "k": encoded})


def _identity(claims: dict[str, Any]) -> Identity:
    listed = claims.get("conversations", [])
    issued_at = claims.get("iat", 0)
    if not isinstance(listed, list) or not all(_is_id(item) for item in listed):
        raise Unauthorized("the token's conversations are no list of ids")
    if not isinstance(issued_at, int | float):
        raise Unauthorized("the token's iat is no time")
    return Identity(_user_id(claims["sub"]), float(claims["exp"]), float(issued_at), frozenset(listed))


def _user_id(subject: Any) -> int:
    if isinstance(subject, str) and subject.isascii() and subject.isdecimal() and len(subject) <= 16:
        subject = int(subject)
    if not _is_id(subject):
        raise Unauthorized("the token's sub is no user id")
    return int(subject)


def _is_id(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_ID
