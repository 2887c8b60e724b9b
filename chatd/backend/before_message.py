"""The `before_message` hook: the backend may refuse or change what a client sends or edits, in time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import msgspec
import trio
from msgspec import UNSET, Struct

from chatd.backend.breaker import Breaker
from chatd.backend.failures import FailureLog
from chatd.backend.fetch import Answer, Fetcher
from chatd.config import Webhooks
from chatd.core import callbacks
from chatd.core.errors import BadRequest, CallFailed, Forbidden, TooLarge, Unavailable, UnusableVerdict
from chatd.core.protocol import Content, TypeName, field_of
from chatd.core.validation import reason
from chatd.observe import metrics
from chatd.observe.logs import Recurring
from chatd.store.write.commands import Create, Edit

EVENT = "before_message"
MESSAGE_CHARS = 1000  # of a reason for a refusal
AT_ONCE = 64  # calls on their way; others wait, within the deadline
ADVICE = "let the hook answer `refuse`, or `change` with what chatd can store (docs/webhooks.md)"

# What the backend is told of a new message, and what may be changed of one; of an edit only what it changes.
SENT = ("conversation_id", "user_id", "type", "content", "meta", "client_id", "reply_to")
EDITED = ("conversation_id", "user_id", "message_id", "content", "meta")

C = TypeVar("C", bound=Create | Edit)

_Action = Literal["accept", "refuse", "change"]


class _Verdict(Struct, frozen=True):
    """What the backend answers. `message` is shown to the one who is refused; a null content or type changes
    nothing.
    """

    action: _Action
    message: str | None = None
    content: Content | None = None
    type: TypeName | None = None
    meta: Any = UNSET


class BeforeMessage:
    def __init__(self, settings: Webhooks, fetch: Fetcher, check: Callable[[Create | Edit], None]) -> None:
        """`check` raises BadRequest or TooLarge for what cannot be stored."""
        self._settings, self._fetch, self._check = settings, fetch, check
        self._breaker = Breaker()
        self._slots = trio.CapacityLimiter(AT_ONCE)
        self._failures = FailureLog("hook_failed", metrics.HOOK_FAILURES, metrics.BACKEND_ANSWERS.labels(EVENT))
        self._unusable: dict[str, tuple[str, Recurring]] = {}  # by field: the incident, and its line in the log

    async def check(self, wanted: C) -> C:
        """What may be stored. Raises Forbidden; Unavailable where that is what silence means; UnusableVerdict,
        for nobody knows then what the backend would have let in.
        """
        try:
            return self._apply(wanted, await self._ask_in_time(wanted))
        except Unavailable:
            if self._settings.before_message_failure == "accept":
                return wanted
            raise

    async def _ask_in_time(self, wanted: Create | Edit) -> _Verdict:
        """Raises Unavailable, and says so in the log."""
        with self._failures.noted():
            with trio.move_on_after(self._settings.before_message_timeout):
                return await self._ask(wanted)
            raise CallFailed("timeout", "no call was free in time: others are on their way")

    async def _ask(self, wanted: Create | Edit) -> _Verdict:
        names = SENT if isinstance(wanted, Create) else EDITED
        values = ((name, getattr(wanted, name)) for name in names)
        content = callbacks.body(EVENT, {name: value for name, value in values if value is not UNSET})
        started = trio.current_time()
        async with self._slots:
            with self._breaker.call():
                try:
                    answer = await self._fetch(
                        "POST",
                        self._settings.before_message_url,
                        within=self._settings.before_message_timeout * 0.95,  # ours, so that it is seen to fail
                        headers=callbacks.headers(self._settings.secret, EVENT, secrets.token_hex(8), content),
                        content=content,
                    )
                finally:
                    metrics.HOOK_SECONDS.observe(trio.current_time() - started)
                return self._verdict(answer)

    def _verdict(self, answer: Answer) -> _Verdict:
        """Raises CallFailed for what is none, UnusableVerdict for one that cannot be followed."""
        wrong = CallFailed("wrong_answer", f"it answered {answer.status}, and no verdict")
        if answer.status != 200:
            raise wrong
        try:
            return msgspec.json.decode(answer.body, type=_Verdict)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if not _is_verdict(answer.body):
                raise wrong from None
            raise self._cannot_use(*_mistake(error)) from None

    def _apply(self, wanted: C, verdict: _Verdict) -> C:
        if verdict.action == "refuse":
            raise Forbidden((verdict.message or "this message was refused")[:MESSAGE_CHARS])
        if verdict.action == "accept":
            return wanted
        changed = _changed(wanted, verdict)
        try:
            self._check(changed)
        except (BadRequest, TooLarge) as error:
            raise self._cannot_use(error.field, str(error)) from None
        return changed

    def _cannot_use(self, field: str | None, why: str) -> UnusableVerdict:
        """A line now and then for each field, with one incident: so the log has each that a client is told."""
        metrics.HOOK_FAILURES.labels("unusable_verdict").inc()
        fresh = secrets.token_hex(6), Recurring("hook_verdict_unusable")
        incident, line = self._unusable.setdefault(field or "", fresh)
        line.warn(incident=incident, field=field, why=why, advice=ADVICE)
        return UnusableVerdict(incident=incident)


def _changed(wanted: C, verdict: _Verdict) -> C:
    fresh: dict[str, Any] = {"meta": verdict.meta} if verdict.meta is not UNSET else {}
    if verdict.content is not None:
        fresh["content"] = verdict.content
    if isinstance(wanted, Create):
        # A retry is told by what the client asked for, not by what the backend made of it.
        fresh |= {"type": verdict.type or wanted.type, "asked": wanted.request_hash()}
    return msgspec.structs.replace(wanted, **fresh)


def _mistake(error: Exception) -> tuple[str | None, str]:
    """(field, why)"""
    if isinstance(error, msgspec.ValidationError):
        return field_of(error), reason(error)
    return None, "holds text or a number that cannot be kept"


def _is_verdict(body: bytes) -> bool:
    """Whether it says what is to be done, if not in a way that can be done. The standard library also reads
    what msgspec refuses: half of an emoji, 1e999.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("action") in get_args(_Action)
