"""Asks the backend to which user a token belongs. Implements `auth.Authenticator`.

If the backend does not answer, chatd does not refuse the login but asks the client to retry. It caches an
answer for some seconds, so that thousands of reconnecting clients do not cause two calls each. After a
revocation, cached answers from before it no longer count and chatd asks again. That answer decides, because the
backend knows which of its logins it has withdrawn.
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
from chatd.backend.failures import FailureLog, advice_for
from chatd.backend.fetch import Answer, Fetcher
from chatd.config.settings import Settings
from chatd.core.errors import CallFailed, Final, Outdated, Unauthorized
from chatd.core.lenient import soften
from chatd.core.model import Identity
from chatd.core.protocol import Id
from chatd.observe import metrics

AT_ONCE = 32  # most calls at the same time
REMEMBERED = 10_000  # most tokens in the cache
_REFUSALS = frozenset([401, 403, 404, 422])  # with these statuses the backend says that the token is not valid


class _Login(Struct, frozen=True):
    """The backend's answer. `expires_in` is in seconds; None is a login that does not expire, as in Sanctum."""

    user_id: Id
    expires_in: Annotated[float, Meta(gt=0)] | None = None
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
        """The identity that the backend gives to a token. Raises Unauthorized, Unavailable."""
        return await self._identify(token, 0)

    async def renew(self, token: str, outdated: Outdated) -> Identity:
        """Ask again if the cached answer is from before a revocation. Raises Unauthorized, Unavailable."""
        return await self._identify(token, outdated.valid_after)

    async def _identify(self, token: str, after: int) -> Identity:
        """`after`: the `valid_after` of a revocation that the answer must be later than; 0: none."""
        key = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        if identity := self._remembered(key, after):
            return identity
        lock = self._asking.setdefault(key, trio.Lock())
        try:
            with trio.move_on_after(self._timeout) as waiting:
                async with lock:  # logins with the same token share one call
                    if identity := self._remembered(key, after):
                        return identity
                    async with self._slots:
                        waiting.deadline = math.inf  # the call has a deadline of its own
                        return self._remember(key, await self._ask(token, after))
        finally:
            if not lock.locked():
                self._asking.pop(key, None)
        with self._failures.noted():
            raise CallFailed("timeout", "too many calls are running: none ended in time for this one")

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
            if answer.status in _REFUSALS:
                raise Unauthorized(Final.TOKEN_REFUSED, f"the backend answered {answer.status}")
            login = _login(answer)
            expires_at = time.time() + (login.expires_in or self._settings.now.auth.token_ttl)
            rooms = frozenset(login.conversations or ())
            # `issued_at` is when chatd asked: the answer may miss a revocation that came after that.
            return Identity(login.user_id, expires_at, asked_at, rooms, after=after, asked=True)

    def _headers(self) -> dict[str, str]:
        token = self._settings.now.api.internal_token
        # Without this Accept, Laravel answers a failed validation or a missing login with a redirect.
        return {"X-Internal-Token": token, "Content-Type": "application/json", "Accept": "application/json"}

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


def _login(answer: Answer) -> _Login:
    """Raises CallFailed for an answer that is not a login."""
    try:
        if not 200 <= answer.status < 300:
            raise ValueError
        found = msgspec.json.decode(answer.body)
        if isinstance(found, dict) and isinstance(found.get("data"), dict):
            found = found["data"]  # Laravel wraps a JsonResource
        return msgspec.convert(soften(_Login, found), _Login)
    except (msgspec.DecodeError, ValueError, RecursionError):
        reason = f"the backend answered {answer.status} without a valid login"
        advice = advice_for(answer.status, '{"user_id": 5, "expires_in": 3600}')
        raise CallFailed("wrong_answer", reason, advice) from None
