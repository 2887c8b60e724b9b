"""Public keys from a URL (JWKS, RFC 7517). Fetches the set when a key is needed, and again if a key is unknown.

Only a set that was fetched after a token arrived proves that the token's key does not exist. With an older set,
the key may have been published a moment ago.
"""

from __future__ import annotations

from typing import Any

import jwt
import msgspec
import trio
from msgspec import Struct

from chatd.backend.fetch import Fetcher
from chatd.core.errors import CallFailed, NotYet, Unavailable
from chatd.observe.logs import Recurring

KEEP = 600.0  # seconds to keep a set; a withdrawn key is accepted no longer than this
UNKNOWN = 60.0  # least seconds between two fetches for unknown kids, because anybody can invent a kid
RETRY = 1.0  # seconds between two attempts while the server does not answer
TIMEOUT = 3.0  # seconds
KEYS = 100  # most keys of a set that are used

# (kty, crv) → the only algorithm that chatd uses such a key with.
_ALGORITHMS: dict[tuple[Any, Any], str] = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}

_unavailable = Recurring("keys_unavailable")


class _Set(Struct):
    keys: list[dict[str, Any]]


class KeyServer:
    def __init__(self, fetch: Fetcher, url: str) -> None:
        self._fetch, self._url = fetch, url
        self._keys: list[tuple[str | None, str, Any]] = []  # (kid, algorithm, key)
        self._fetched_at = self._tried_at = -KEEP
        self._one = trio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> list[Any]:
        """The keys that may have signed a token; a `kid` of None matches all of its algorithm.

        Raises Unavailable if the server does not answer, NotYet if the set may be too old to have the key.
        """
        asked_at = trio.current_time()
        if self._age() >= KEEP:
            await self._refresh(KEEP, RETRY)
        return self._matching(kid, algorithm) or await self._look_again(kid, algorithm, asked_at)

    async def find_newer(self, kid: str | None, algorithm: str) -> list[Any]:
        """Like `find`, but from a set fetched after this call, for a token that no key of `find` has signed."""
        return await self._look_again(kid, algorithm, trio.current_time())

    async def _look_again(self, kid: str | None, algorithm: str, asked_at: float) -> list[Any]:
        if self._age() >= UNKNOWN and self._fetched_at < asked_at:
            await self._refresh(UNKNOWN, UNKNOWN)
        if self._fetched_at < asked_at:
            wait = max(RETRY, self._tried_at + UNKNOWN - trio.current_time())
            why = f"the token's key {kid!r:.80} is not in the key server's set, which may be outdated"
            raise NotYet(why, "the key of this token is not known yet", retry_after=round(wait, 3))
        return self._matching(kid, algorithm)

    def _matching(self, kid: str | None, algorithm: str) -> list[Any]:
        return [key for id, fits, key in self._keys if fits == algorithm and kid in (None, id)]

    def _age(self) -> float:
        return trio.current_time() - self._fetched_at

    async def _refresh(self, older_than: float, since_last_try: float) -> None:
        async with self._one:
            if self._age() < older_than:
                return  # another caller has refreshed it while this one waited for the lock
            if trio.current_time() - self._tried_at < since_last_try:
                if self._age() < KEEP:
                    return
                raise Unavailable("the key server does not answer")
            self._tried_at = trio.current_time()
            try:
                self._keys = await self._read()
            except CallFailed as error:
                _unavailable.warn(error=error.reason)
                if self._age() >= KEEP:
                    raise Unavailable("the key server does not answer") from error
            else:
                self._fetched_at = trio.current_time()

    async def _read(self) -> list[tuple[str | None, str, Any]]:
        answer = await self._fetch("GET", self._url, within=TIMEOUT)
        try:
            if answer.status != 200:
                raise ValueError
            found: list[dict[str, Any]] = msgspec.json.decode(answer.body, type=_Set).keys
            return [key for item in found[:KEYS] if (key := _key(item))]
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
            reason = f"the key server answered {answer.status} without a valid set of keys"
            raise CallFailed("wrong_answer", reason) from None


def _key(item: dict[str, Any]) -> tuple[str | None, str, Any] | None:
    """(kid, algorithm, key) of an entry of the set; None if its kind or use does not fit."""
    algorithm = _ALGORITHMS.get((item.get("kty"), item.get("crv")))
    if algorithm is None or item.get("use", "sig") != "sig" or item.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK.from_dict(item | {"alg": algorithm})
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    kid = item.get("kid")
    return (kid if isinstance(kid, str) else None), algorithm, key
