"""The `before_message` hook: the backend may refuse or change what a client sends or edits, in time."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec
import trio
from msgspec import UNSET, Struct, UnsetType

from chatd import calls, metrics
from chatd.breaker import Breaker
from chatd.config import Webhooks
from chatd.errors import CallFailed, Forbidden, Unavailable
from chatd.fetch import Fetcher
from chatd.protocol import Content, TypeName
from chatd.store.commands import Create, Edit
from chatd.trouble import Trouble

EVENT = "before_message"
MESSAGE_CHARS = 1000  # of a reason for a refusal
AT_ONCE = 64  # calls on their way; others wait, within the deadline


# What the backend is told of a new message, and what may be changed of one; of an edit only what it changes.
SENT = ("conversation_id", "user_id", "type", "content", "meta", "client_id", "reply_to")
EDITED = ("conversation_id", "user_id", "message_id", "content", "meta")

C = TypeVar("C", bound=Create | Edit)


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
        self._trouble = Trouble("hook_failed", metrics.HOOK_FAILURES, metrics.BACKEND_ANSWERS.labels(EVENT))

    async def check(self, wanted: C) -> C:
        """What may be stored. Raises Forbidden; Unavailable where that is what silence means."""
        try:
            return self._apply(wanted, await self._ask_in_time(wanted))
        except Unavailable:
            if self._settings.before_message_failure == "accept":
                return wanted
            raise

    async def _ask_in_time(self, wanted: Create | Edit) -> _Verdict:
        """Raises Unavailable, and says so in the log."""
        with self._trouble.noted():
            with trio.move_on_after(self._settings.before_message_timeout):
                return await self._ask(wanted)
            raise CallFailed("timeout", "no call was free in time: others are on their way")

    async def _ask(self, wanted: Create | Edit) -> _Verdict:
        names = SENT if isinstance(wanted, Create) else EDITED
        values = ((name, getattr(wanted, name)) for name in names)
        content = calls.body(EVENT, {name: value for name, value in values if value is not UNSET})
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
    def _apply(wanted: C, verdict: _Verdict) -> C:
        if verdict.action == "refuse":
            raise Forbidden((verdict.message or "this message was refused")[:MESSAGE_CHARS])
        if verdict.action == "accept":
            return wanted
        fresh: dict[str, Any] = {"content": verdict.content, "meta": verdict.meta}
        if isinstance(wanted, Create):
            # A retry is told by what the client asked for, not by what the backend made of it.
            fresh |= {"type": verdict.type, "asked": wanted.request_hash()}
        fresh = {name: value for name, value in fresh.items() if value is not UNSET}
        return msgspec.structs.replace(wanted, **fresh)


def _verdict(status: int, content: bytes) -> _Verdict:
    try:
        if status != 200:
            raise ValueError
        return msgspec.json.decode(content, type=_Verdict)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CallFailed("wrong_answer", f"it answered {status}, and no verdict") from None
