"""The `before_message` hook: the backend may refuse or change what a client wants to send, in time."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import trio
from msgspec import UNSET, Struct, UnsetType

from chatd import calls, metrics
from chatd.breaker import Breaker
from chatd.config import Webhooks
from chatd.errors import Forbidden, Unavailable
from chatd.fetch import Fetcher
from chatd.protocol import Content, TypeName
from chatd.store.commands import Create

EVENT = "before_message"
MESSAGE_CHARS = 1000  # of a reason for a refusal
AT_ONCE = 64  # calls on their way; others wait, within the deadline


class _Verdict(Struct, frozen=True):
    """What the backend answers. `message` is shown to the one who is refused."""

    action: Literal["accept", "refuse", "change"]
    message: str | None = None
    content: Content | UnsetType = UNSET
    type: TypeName | UnsetType = UNSET
    meta: Any = UNSET


class BeforeMessage:
    def __init__(self, settings: Webhooks, fetch: Fetcher) -> None:
        self._settings, self._fetch = settings, fetch
        self._breaker = Breaker()
        self._places = trio.CapacityLimiter(AT_ONCE)

    async def check(self, message: Create) -> Create:
        """The message as it may be stored. Raises Forbidden; Unavailable where that is what silence means."""
        try:
            with trio.move_on_after(self._settings.before_message_timeout):
                return self._apply(message, await self._ask(message))
            raise Unavailable("the backend does not answer")
        except Unavailable:
            if self._settings.before_message_failure == "accept":
                return message
            raise

    async def _ask(self, message: Create) -> _Verdict:
        names = ("conversation_id", "user_id", "type", "content", "meta", "client_id", "reply_to")
        content = calls.body(EVENT, {name: getattr(message, name) for name in names})
        started = trio.current_time()
        async with self._places:
            with self._breaker.call():
                try:
                    answer = await self._fetch(
                        "POST",
                        self._settings.before_message_url,
                        within=self._settings.before_message_timeout * 0.95,  # ours, so that it is seen to fail
                        headers=calls.headers(self._settings.secret, EVENT, content),
                        content=content,
                    )
                finally:
                    metrics.HOOK_SECONDS.observe(trio.current_time() - started)
                return _verdict(answer.status, answer.body)

    @staticmethod
    def _apply(message: Create, verdict: _Verdict) -> Create:
        if verdict.action == "refuse":
            raise Forbidden((verdict.message or "this message was refused")[:MESSAGE_CHARS])
        if verdict.action == "accept":
            return message
        fresh = {name: getattr(verdict, name) for name in ("content", "type", "meta")}
        fresh = {name: value for name, value in fresh.items() if value is not UNSET}
        # A retry is told by what the client asked for, not by what the backend made of it.
        return msgspec.structs.replace(message, **fresh, asked=message.request_hash())


def _verdict(status: int, content: bytes) -> _Verdict:
    try:
        if status != 200:
            raise ValueError
        return msgspec.json.decode(content, type=_Verdict)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Unavailable("the backend gave no verdict") from None
