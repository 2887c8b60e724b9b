"""JWTs: issued for backends with the shared secret, verified for connections with whatever key fits.

HS256 with the current and the previous secret; RS256, ES256 and EdDSA with public keys from files or from a key
server. Revocation is not here: a token says who somebody is, the database whether that still counts.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from chatd.auth.keyserver import KeyServer
from chatd.config import Auth
from chatd.errors import ConfigError, Forbidden, TokenExpired, Unauthorized
from chatd.limits import MAX_ID
from chatd.model import Identity

SHARED = "HS256"
MAX_TOKEN_CHARS = 8192  # longer is no token of ours, and is not looked into
RSA_BITS = 2048  # shorter keys are broken in practice

_WRONG = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


class Tokens:
    """Implements `auth.Authenticator`."""

    def __init__(self, secret: str, config: Auth = Auth(), key_server: KeyServer | None = None) -> None:
        """`secret` if the configuration has none. Raises ConfigError for a key file that is none."""
        self._config, self._key_server = config, key_server
        secret = config.secret or secret
        self._secret = secret
        # As prepared keys: a secret that comes as text is looked at anew, for what it might be, at each token.
        self._secrets = [_shared_key(one) for one in (secret, config.previous_secret) if one]
        self._files = [_file_key(Path(name)) for name in config.key_files]
        self._shared_only = config.algorithms == [SHARED]
        self._checks = _checks(config)

    def issue(
        self, user_id: int, ttl: int, conversations: Iterable[int] | None = None, *, since: int = 0
    ) -> str:
        """A token for a user that lives `ttl` seconds. `since`: the earliest `iat` that counts, in seconds.

        Raises Forbidden where a token of ours would not be accepted.
        """
        if SHARED not in self._config.algorithms or self._config.backend_url:
            raise Forbidden("this server issues no tokens: your backend signs, or verifies, them itself")
        now = int(time.time())
        now = since if since == now + 1 else now
        claims: dict[str, Any] = {"sub": str(user_id), "iat": now, "exp": now + ttl}
        claims |= {"aud": self._config.audience} if self._config.audience else {}
        claims |= {"iss": self._config.issuer} if self._config.issuer else {}
        if conversations is not None:
            claims["conversations"] = sorted(conversations)
        return jwt.encode(claims, self._secret, algorithm=SHARED)

    async def authenticate(self, token: str) -> Identity:
        """Raises Unauthorized, TokenExpired; Unavailable where a key cannot be had."""
        if self._shared_only or len(token) > MAX_TOKEN_CHARS:
            return self.verify(token)
        algorithm, kid = self._header(token)
        return self._verify(token, algorithm, await self._keys(algorithm, kid))

    def verify(self, token: str) -> Identity:
        """With the secrets alone."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized("this token is not valid")
        return self._verify(token, SHARED, self._secrets)

    def _header(self, token: str) -> tuple[str, str | None]:
        """(alg, kid). Where a key may be found (jku, x5u, jwk) a token does not decide."""
        try:
            header = jwt.get_unverified_header(token)
        except _WRONG:
            raise Unauthorized("this token is not valid") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._config.algorithms:
            raise Unauthorized("this token is not valid")
        return algorithm, kid if isinstance(kid, str) else None

    async def _keys(self, algorithm: str, kid: str | None) -> list[Any]:
        """Each key is used with its own algorithm alone."""
        if algorithm == SHARED:
            return self._secrets
        keys = [key for fits, key in self._files if fits == algorithm]
        if self._key_server is not None:
            keys += await self._key_server.find(kid, algorithm)
        return keys

    def _verify(self, token: str, algorithm: str, keys: list[Any]) -> Identity:
        for key in keys:
            try:
                return _identity(jwt.decode(token, key, algorithms=[algorithm], **self._checks))
            except jwt.ExpiredSignatureError:
                raise TokenExpired() from None
            except jwt.InvalidSignatureError:
                continue
            except _WRONG:
                break
        raise Unauthorized("this token is not valid")


def _checks(config: Auth) -> dict[str, Any]:
    """How PyJWT is to look at the claims."""
    required = ["sub", "exp"] + ["aud"] * bool(config.audience) + ["iss"] * bool(config.issuer)
    # `sub` may be an integer, which PyJWT's own check refuses. A clock ahead of ours issues nothing wrong.
    options: dict[str, Any] = {"require": required, "verify_sub": False, "verify_iat": False}
    options["verify_aud"] = bool(config.audience)
    checks: dict[str, Any] = {"options": options, "leeway": config.leeway}
    checks |= {"audience": config.audience} if config.audience else {}
    checks |= {"issuer": config.issuer} if config.issuer else {}
    return checks


def _shared_key(secret: str) -> jwt.PyJWK:
    encoded = base64.urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()
    return jwt.PyJWK.from_dict({"kty": "oct", "alg": SHARED, "k": encoded})


def _file_key(path: Path) -> tuple[str, Any]:
    """(algorithm, key) of a public key in PEM."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no public key in PEM"
        raise ConfigError(f"auth.key_files: {path}: {reason}.") from None
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS:
        return "RS256", key
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1":
        return "ES256", key
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA", key
    raise ConfigError(f"auth.key_files: {path}: use RSA with {RSA_BITS} bits or more, P-256 or Ed25519.")


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
