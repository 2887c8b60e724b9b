"""JWTs: issues them for backends with the shared secret, and verifies them for connections with the right key.

HS256, HS384 and HS512 use the current and the previous secret; RS256, ES256 and EdDSA use public
keys from files or a key server. This module knows nothing of revocations: a token names the user,
and the database says whether the login is revoked.
"""

from __future__ import annotations

import base64
import math
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
from chatd.config import Auth, Limits
from chatd.core.errors import (
    BadRequest,
    ChatError,
    ConfigError,
    Final,
    Forbidden,
    NotYet,
    Outdated,
    TokenExpired,
    Unauthorized,
)
from chatd.core.ids import id_of, ids_of
from chatd.core.limits import AUTH_BYTES, MAX_ID
from chatd.core.model import Identity

SHARED = ("HS256", "HS384", "HS512")  # algorithms that use the secret, which the backend may have as well
MAX_TOKEN_CHARS = 8192  # longer tokens are refused without reading them
RSA_BITS = 2048  # least length of an RSA key (NIST SP 800-131A allows no shorter ones)
SOON = 60.0  # seconds; a token that becomes valid later is wrong: no clock differs by so much
AFTER = "chatd_after"  # a claim of our own tokens: the user's last revocation when the token was issued

_WRONG = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


class Tokens:
    """Implements `auth.Authenticator`."""

    def __init__(
        self,
        secret: str,
        config: Auth = Auth(),
        key_server: KeyServer | None = None,
        *,
        frame_bytes: int = Limits().frame_bytes,
    ) -> None:
        """`secret` is used if the configuration has none.

        Raises ConfigError if a key file holds no valid key.
        """
        self._config, self._key_server = config, key_server
        # An issued token must fit into the `auth` frame that brings it.
        self._most = min(MAX_TOKEN_CHARS, frame_bytes - AUTH_BYTES)
        secret = config.secret or secret
        self._secret = secret
        # Prepared as key objects, because PyJWT examines a secret given as text again for each token.
        self._secrets: dict[str, list[jwt.PyJWK]] = {
            algorithm: [_shared_key(one, algorithm) for one in (secret, config.previous_secret) if one]
            for algorithm in SHARED
            if algorithm in config.algorithms
        }
        self._files = [_file_key(Path(name)) for name in config.key_files]
        self._issued_with = next((name for name in config.algorithms if name in SHARED), None)
        self._shared_only = [self._issued_with] == config.algorithms
        self._checks = _checks(config)

    def issue(
        self, user_id: int, ttl: int, conversations: Iterable[int] | None = None, *, since: int = 0
    ) -> str:
        """A token for a user, valid for `ttl` seconds. `since`: `valid_after` of the user's last revocation.

        Raises Forbidden if this server does not accept tokens of its own, BadRequest if the
        token would be too long.
        """
        if self._issued_with is None or self._config.backend_url:
            raise Forbidden("this server issues no tokens, because your backend signs or verifies them itself")
        now = int(time.time())
        # Nodes with older versions of chatd check only `iat`, so it must not be earlier than the revocation.
        claims: dict[str, Any] = {"sub": str(user_id), "iat": max(now, since), "exp": now + ttl, AFTER: since}
        claims |= {"aud": self._config.audience} if self._config.audience else {}
        claims |= {"iss": self._config.issuer} if self._config.issuer else {}
        if conversations is not None:
            claims["conversations"] = sorted(conversations)
        token = jwt.encode(claims, self._secret, algorithm=self._issued_with)
        if len(token) > self._most:
            raise BadRequest(_too_many(len(token), self._most), field="conversations")
        return token

    async def authenticate(self, token: str) -> Identity:
        """Verify a token.

        Raises Unauthorized, TokenExpired, NotYet; Unavailable if the key server does not answer.
        """
        if self._shared_only or len(token) > MAX_TOKEN_CHARS:
            return self.verify(token)
        algorithm, kid = self._header(token)
        try:
            return self._verify(token, algorithm, await self._keys(algorithm, kid))
        except Unauthorized as refused:
            # A token without a kid that fits no key may have been signed with a new key.
            if refused.way is not Final.TOKEN_SIGNATURE or kid or algorithm in SHARED or not self._key_server:
                raise
            return self._verify(token, algorithm, await self._key_server.find_newer(kid, algorithm))

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        raise outdated

    def verify(self, token: str) -> Identity:
        """Verify a token with the secrets only, and with the algorithm of the tokens that chatd issues.

        Raises Unauthorized, TokenExpired, NotYet.
        """
        if len(token) > MAX_TOKEN_CHARS:
            why = f"the token has {len(token)} characters; at most {MAX_TOKEN_CHARS} are accepted"
            raise Unauthorized(Final.TOKEN_TOO_LONG, why)
        assert self._issued_with is not None
        return self._verify(token, self._issued_with, self._secrets[self._issued_with])

    def _header(self, token: str) -> tuple[str, str | None]:
        """(alg, kid). Ignores jku, x5u and jwk: a token must not choose where its key comes from."""
        try:
            header = jwt.get_unverified_header(token)
        except _WRONG:
            raise Unauthorized(Final.TOKEN_MALFORMED, "the token is not a JWT") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._config.algorithms:
            raise _other_algorithm(token)
        return algorithm, kid if isinstance(kid, str) else None

    async def _keys(self, algorithm: str, kid: str | None) -> list[Any]:
        """The keys for an algorithm. A public key is never used with another algorithm than its own."""
        if algorithm in SHARED:
            return self._secrets[algorithm]
        keys = [key for fits, key in self._files if fits == algorithm]
        if self._key_server is not None:
            keys += await self._key_server.find(kid, algorithm)
        return keys

    def _verify(self, token: str, algorithm: str, keys: list[Any]) -> Identity:
        if not keys:
            raise Unauthorized(Final.TOKEN_KEY, "there is no key for the token's kid and alg")
        for key in keys:
            try:
                claims = jwt.decode(token, key, algorithms=[algorithm], **self._checks)
            except jwt.InvalidSignatureError:
                continue
            except _WRONG as error:
                raise self._refusal(token, error) from None
            return _identity(claims, ours=algorithm in SHARED)
        raise Unauthorized(Final.TOKEN_SIGNATURE, "no key of this server matches the token's signature")

    def _refusal(self, token: str, error: Exception) -> ChatError:
        """The error for PyJWT's. PyJWT checks the signature first, so the claims are the issuer's own."""
        match error:
            case jwt.ExpiredSignatureError():
                return TokenExpired()
            case jwt.InvalidAlgorithmError():
                return _other_algorithm(token)
            case jwt.ImmatureSignatureError():
                wait = int(_unverified(token)["nbf"]) - time.time() - self._config.leeway
                why = f"the token is valid in {wait:.0f} s (nbf): do the clocks differ? See auth.leeway."
                return (
                    NotYet(why, retry_after=max(0.1, round(wait, 3)))
                    if wait <= SOON
                    else Unauthorized(Final.TOKEN_NOT_YET, why)
                )
            case jwt.MissingRequiredClaimError(claim=claim):
                return Unauthorized(Final.TOKEN_CLAIM, f"the token has no {claim}")
            case jwt.InvalidAudienceError():
                return Unauthorized(Final.TOKEN_CLAIM, "the token's aud is not auth.audience")
            case jwt.InvalidIssuerError():
                return Unauthorized(Final.TOKEN_CLAIM, "the token's iss is not auth.issuer")
            case _:
                return Unauthorized(Final.TOKEN_MALFORMED, f"{type(error).__name__}: {error!s:.100}")


def _checks(config: Auth) -> dict[str, Any]:
    """PyJWT's options for checking the claims."""
    required = ["sub", "exp"] + ["aud"] * bool(config.audience) + ["iss"] * bool(config.issuer)
    # `sub` may be an integer, which PyJWT's check refuses. `iat` may be in the future if the
    # issuer's clock is ahead.
    options: dict[str, Any] = {"require": required, "verify_sub": False, "verify_iat": False}
    options["verify_aud"] = bool(config.audience)
    checks: dict[str, Any] = {"options": options, "leeway": config.leeway}
    checks |= {"audience": config.audience} if config.audience else {}
    checks |= {"issuer": config.issuer} if config.issuer else {}
    return checks


def _shared_key(secret: str, algorithm: str) -> jwt.PyJWK:
    encoded = base64.urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()
    return jwt.PyJWK.from_dict({"kty": "oct", "alg": algorithm, "k": encoded})


def _file_key(path: Path) -> tuple[str, Any]:
    """(algorithm, key) of a PEM file with a public key. Raises ConfigError."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe could block for ever
            raise ValueError
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a public key in PEM format"
        raise ConfigError(f"auth.key_files: {path}: {reason}.") from None
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS:
        return "RS256", key
    if isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1":
        return "ES256", key
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA", key
    raise ConfigError(f"auth.key_files: {path}: use RSA with {RSA_BITS} bits or more, P-256 or Ed25519.")


def _unverified(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def _other_algorithm(token: str) -> Unauthorized:
    try:
        named = jwt.get_unverified_header(token).get("alg")
    except _WRONG:
        return Unauthorized(Final.TOKEN_MALFORMED, "the token is not a JWT")
    return Unauthorized(Final.TOKEN_ALGORITHM, f"the token's alg {named!r:.40} is not in auth.algorithms")


def _too_many(chars: int, most: int) -> str:
    return (
        f"The token would have {chars} characters, but a login accepts at most {most}: list fewer"
        " conversations, and make the user a member of the others."
    )


def _identity(claims: dict[str, Any], *, ours: bool) -> Identity:
    """The identity in a token's claims.

    `ours`: our secret signed it, so our own claims in it can be trusted.
    """
    rooms = ids_of(claims.get("conversations"))
    if rooms is None:
        raise Unauthorized(Final.TOKEN_ROOMS, "the token's conversations are not a list of ids")
    user_id, expires_at, issued_at = (
        _user_id(claims["sub"]),
        _time("exp", claims["exp"]),
        _time("iat", claims.get("iat", 0)),
    )
    after = claims.get(AFTER) if ours else None
    return Identity(user_id, expires_at, issued_at, frozenset(rooms), after if type(after) is int else None)


def _time(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool) or not math.isfinite(found := float(value)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise Unauthorized(Final.TOKEN_CLAIM, f"the token's {name} is not a time") from None
    return found


def _user_id(subject: Any) -> int:
    if (found := id_of(subject)) is None:
        why = f"the token's sub is {subject!r:.60}: user ids are integers from 1 to {MAX_ID}, not UUIDs"
        raise Unauthorized(Final.TOKEN_USER, why)
    return found
