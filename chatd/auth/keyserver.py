"""Public keys from a URL (JWKS, RFC 7517): fetched when needed, and again when one is unknown, but seldom.

That a key does not exist is known only from a set that was fetched after somebody had asked for it. Until then
a token may have been signed with a key that was published a moment ago.
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

KEEP = 600.0  # seconds; a key that was withdrawn is accepted for no longer
UNKNOWN = 60.0  # seconds between two fetches for a kid that is not known: anybody can make one up
RETRY = 1.0  # seconds between two attempts while the server does not answer
TIMEOUT = 3.0  # seconds
KEYS = 100  # of one set

# (kty, crv) → the algorithm that such a key is used with here.
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
        self._keys: list[tuple[str | None, str, Any]] = []  # kid, algorithm, key
        self._fetched_at = self._tried_at = -KEEP
        self._one = trio.Lock()

    async def find(self, kid: str | None, algorithm: str) -> list[Any]:
        """The keys that a token may have been signed with, if there are any. Raises Unavailable, NotYet."""
        asked_at = trio.current_time()
        if self._age() >= KEEP:
            await self._refresh(KEEP, RETRY)
        return self._matching(kid, algorithm) or await self._look_again(kid, algorithm, asked_at)

    async def find_newer(self, kid: str | None, algorithm: str) -> list[Any]:
        """What those that `find` would give are not enough for: as of now. Raises Unavailable, NotYet."""
        return await self._look_again(kid, algorithm, trio.current_time())

    async def _look_again(self, kid: str | None, algorithm: str, asked_at: float) -> list[Any]:
        if self._age() >= UNKNOWN and self._fetched_at < asked_at:
            await self._refresh(UNKNOWN, UNKNOWN)
        if self._fetched_at < asked_at:
            wait = max(RETRY, self._tried_at + UNKNOWN - trio.current_time())
            why = f"its key {kid!r:.80} is not in the set, which may be out of date"
            raise NotYet(why, "the key of this token is not known yet", retry_after=round(wait, 3))
        return self._matching(kid, algorithm)

    def _matching(self, kid: str | None, algorithm: str) -> list[Any]:
        return [key for id, fits, key in self._keys if fits == algorithm and kid in (None, id)]

    def _age(self) -> float:
        return trio.current_time() - self._fetched_at

    async def _refresh(self, older_than: float, since_last_try: float) -> None:
        async with self._one:
            if self._age() < older_than:
                return  # who was before us in the queue has done it
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
            raise CallFailed("wrong_answer", f"it answered {answer.status}, and no set of keys") from None


def _key(item: dict[str, Any]) -> tuple[str | None, str, Any] | None:
    """None for a key of another kind, or for another use."""
    algorithm = _ALGORITHMS.get((item.get("kty"), item.get("crv")))
    if algorithm is None or item.get("use", "sig") != "sig" or item.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK.from_dict(item | {"alg": algorithm})
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    kid = item.get("kid")
    return (kid if isinstance(kid, str) else None), algorithm, key
