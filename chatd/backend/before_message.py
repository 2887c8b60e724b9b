"""The `before_message` hook: the backend may refuse or change a client's message or edit
before chatd stores it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import msgspec
import trio
from msgspec import UNSET, Struct

from chatd.backend.breaker import Breaker
from chatd.backend.failures import FailureLog, advice_for
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
MESSAGE_CHARS = 1000  # longest reason for a refusal that the client gets
AT_ONCE = 64  # most calls at the same time; others wait, within the deadline
ADVICE = "let the hook answer `refuse`, or `change` with values that chatd can store (docs/webhooks.md)"

# The fields of a new message, and of an edit, that the backend gets. An edit has only the
# fields that it changes.
SENT = ("conversation_id", "user_id", "type", "content", "meta", "client_id", "reply_to")
EDITED = ("conversation_id", "user_id", "message_id", "content", "meta")

C = TypeVar("C", bound=Create | Edit)

_Action = Literal["accept", "refuse", "change"]


class _Verdict(Struct, frozen=True):
    """The backend's answer. `message`: the reason that a refused client gets. A null content or type changes
    nothing.
    """

    action: _Action
    message: str | None = None
    content: Content | None = None
    type: TypeName | None = None
    meta: Any = UNSET


class BeforeMessage:
    def __init__(self, settings: Webhooks, fetch: Fetcher, check: Callable[[Create | Edit], None]) -> None:
        """`check` raises BadRequest or TooLarge if chatd cannot store a command."""
        self._settings, self._fetch, self._check = settings, fetch, check
        self._breaker = Breaker()
        self._slots = trio.CapacityLimiter(AT_ONCE)
        self._failures = FailureLog("hook_failed", metrics.HOOK_FAILURES, metrics.BACKEND_ANSWERS.labels(EVENT))
        self._unusable: dict[str, tuple[str, Recurring]] = {}  # by field: the incident, and its line in the log

    async def check(self, wanted: C) -> C:
        """Ask the backend, and return the command to store.

        Raises Forbidden if the backend refuses. Raises Unavailable if it gives no answer and
        `before_message_failure` is `refuse`. Raises UnusableVerdict if its answer cannot be applied, whatever
        that option says, because it is not known what the backend would have accepted.
        """
        try:
            return self._apply(wanted, await self._ask_in_time(wanted))
        except Unavailable:
            if self._settings.before_message_failure == "accept":
                return wanted
            raise

    async def _ask_in_time(self, wanted: Create | Edit) -> _Verdict:
        """Ask within the deadline. Logs each failure, and raises Unavailable."""
        with self._failures.noted():
            with trio.move_on_after(self._settings.before_message_timeout):
                return await self._ask(wanted)
            raise CallFailed("timeout", "too many calls are running: none ended in time for this one")

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
                        # It ends before our own deadline, so that the breaker sees the failure.
                        within=self._settings.before_message_timeout * 0.95,
                        headers=callbacks.headers(self._settings.secret, EVENT, secrets.token_hex(8), content),
                        content=content,
                    )
                finally:
                    metrics.HOOK_SECONDS.observe(trio.current_time() - started)
                return self._verdict(answer)

    def _verdict(self, answer: Answer) -> _Verdict:
        """Read the answer.

        Raises CallFailed if it is no verdict, UnusableVerdict if the verdict has invalid fields.
        """
        reason = f"the backend answered {answer.status} without a valid verdict"
        wrong = CallFailed("wrong_answer", reason, advice_for(answer.status, '{"action": "accept"}'))
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
            raise Forbidden((verdict.message or "the backend refused this message")[:MESSAGE_CHARS])
        if verdict.action == "accept":
            return wanted
        changed = _changed(wanted, verdict)
        try:
            self._check(changed)
        except (BadRequest, TooLarge) as error:
            raise self._cannot_use(error.field, str(error)) from None
        return changed

    def _cannot_use(self, field: str | None, why: str) -> UnusableVerdict:
        """Log the problem, at most every few seconds for each field.

        All problems with one field share an incident number, so the log has every number that a client gets.
        """
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
        # A retry has the hash of the client's request, not of what the backend made of it.
        fresh |= {"type": verdict.type or wanted.type, "asked": wanted.request_hash()}
    return msgspec.structs.replace(wanted, **fresh)


def _mistake(error: Exception) -> tuple[str | None, str]:
    """(field, what is wrong with it)"""
    if isinstance(error, msgspec.ValidationError):
        return field_of(error), reason(error)
    return None, "holds text or a number that chatd cannot store"


def _is_verdict(body: bytes) -> bool:
    """Whether the body has a valid action, even if its other fields are not valid.

    It uses the standard library, which also reads JSON that msgspec refuses, such as a lone surrogate or 1e999.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and answer.get("action") in get_args(_Action)
