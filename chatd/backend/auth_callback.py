"""Asks the backend whom a token belongs to. Implements `auth.Authenticator`.

A backend that does not answer is never taken for a no. What it said is remembered for some seconds, so that
thousands who come back at once do not fall upon it twice. After a revocation what it said before counts no
more, and it is asked again: its word is the last, for it knows which of its logins it has withdrawn.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from typing import Annotated

import msgspec
import trio
from msgspec import Meta, Struct

from chatd.backend.breaker import Breaker
from chatd.backend.failures import FailureLog
from chatd.backend.fetch import Fetcher
from chatd.config.settings import Settings
from chatd.core.errors import CallFailed, Final, Outdated, Unauthorized
from chatd.core.model import Identity
from chatd.core.protocol import Id
from chatd.observe import metrics

AT_ONCE = 32  # calls on their way
REMEMBERED = 10_000  # tokens
_NO = frozenset([401, 403, 404, 422])  # the backend has looked, and knows no such login


class _Login(Struct, frozen=True):
    """What the backend answers."""

    user_id: Id
    expires_in: Annotated[float, Meta(gt=0)]
    conversations: list[Id] | None = None


class AuthCallback:
    def __init__(self, settings: Settings, fetch: Fetcher) -> None:
        config = settings.now.auth
        self._settings = settings
        self._url, self._timeout, self._keep = config.backend_url, config.backend_timeout, config.backend_cache
        self._fetch = fetch
        self._slots = trio.CapacityLimiter(AT_ONCE)
        self._breaker = Breaker()
        answers = metrics.BACKEND_ANSWERS.labels("auth")
        self._failures = FailureLog("auth_backend_failed", metrics.AUTH_FAILURES, answers)
        self._known: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()
        self._asking: dict[bytes, trio.Lock] = {}

    async def authenticate(self, token: str) -> Identity:
        """Raises Unauthorized, Unavailable."""
        return await self._identify(token, 0)

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """What the backend says now that the revocation is known. Raises Unauthorized, Unavailable."""
        return await self._identify(token, outdated.valid_after)

    async def _identify(self, token: str, after: int) -> Identity:
        """`after`: a revocation that has happened already."""
        key = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        if identity := self._remembered(key, after):
            return identity
        lock = self._asking.setdefault(key, trio.Lock())
        try:
            with trio.move_on_after(self._timeout) as waiting:
                async with lock:  # who asks for the same token has the answer of the first
                    if identity := self._remembered(key, after):
                        return identity
                    async with self._slots:
                        waiting.deadline = math.inf  # the call has a deadline of its own
                        return self._remember(key, await self._ask(token, after))
        finally:
            if not lock.locked():
                self._asking.pop(key, None)
        with self._failures.noted():
            raise CallFailed("timeout", "no call was free in time: others are on their way")

    async def _ask(self, token: str, after: int) -> Identity:
        asked_at = time.time()
        body = msgspec.json.encode({"token": token})
        started = trio.current_time()
        with self._failures.noted(), self._breaker.call():
            try:
                answer = await self._fetch(
                    "POST", self._url, within=self._timeout, headers=self._headers(), content=body
                )
            finally:
                metrics.AUTH_SECONDS.observe(trio.current_time() - started)
            if answer.status in _NO:
                raise Unauthorized(Final.TOKEN_REFUSED, f"the backend answered {answer.status}")
            return _identity(answer.status, answer.body, asked_at, after)

    def _headers(self) -> dict[str, str]:
        token = self._settings.now.api.internal_token
        return {"X-Internal-Token": token, "Content-Type": "application/json"}

    def _remembered(self, key: bytes, after: int) -> Identity | None:
        until, identity = self._known.get(key, (0.0, None))
        if identity is None or trio.current_time() >= until or (identity.after or 0) < after:
            return None
        return identity

    def _remember(self, key: bytes, identity: Identity) -> Identity:
        keep = min(self._keep, identity.expires_at - time.time())
        if keep > 0:
            self._known[key] = (trio.current_time() + keep, identity)
            self._known.move_to_end(key)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return identity


def _identity(status: int, body: bytes, asked_at: float, after: int) -> Identity:
    try:
        if status != 200:
            raise ValueError
        login = msgspec.json.decode(body, type=_Login)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CallFailed("wrong_answer", f"it answered {status}, and no login") from None
    expires_at, rooms = time.time() + login.expires_in, frozenset(login.conversations or ())
    # As of the question, not of the answer: what was revoked between the two may not be in it.
    return Identity(login.user_id, expires_at, asked_at, rooms, after=after, asked=True)
