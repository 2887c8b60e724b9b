"""What is posted and answered, as structs, and how a request becomes one. OpenAPI is made of them too."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from quart import Response, request

from chatd.errors import BadRequest, NotJSON
from chatd.limits import BATCH_MESSAGES, HISTORY_PAGE, MAX_ID
from chatd.protocol import ClientId, Content, Id, PageSize, TypeName, field_of
from chatd.validation import mistakes, reason

S = TypeVar("S", bound=Struct)

BODY_BYTES = 256 * 1024  # of a request; a batch may be longer
BODY_SECONDS = 10  # a backend has for its body
RESPONSE_SECONDS = 10  # a backend has for reading the answer
EXPLAIN_BYTES = 64 * 1024  # of a longer body only the first mistake is named: reading it again takes too long


class NewMessage(Struct, frozen=True, kw_only=True):
    """A message from a backend. `sender_id` is the user it speaks for."""

    conversation_id: Id
    sender_id: Id
    content: Content
    type: TypeName | None = None
    meta: Any = None
    client_id: ClientId | None = None
    reply_to: Id | None = None


class Stored(Struct, frozen=True, kw_only=True):
    """Committed. `duplicate`: an exact retry, answered with the first id and seq."""

    id: int
    status: str = "ok"
    seq: int
    created_at: str
    duplicate: bool | UnsetType = UNSET


class Batch(Struct, frozen=True):
    messages: Annotated[list[msgspec.Raw], Meta(max_length=BATCH_MESSAGES)]


class BatchResult(Struct, frozen=True, kw_only=True):
    """The keys of `Stored` for what was accepted; `code`, `message` and `errors` for what was not."""

    id: int | UnsetType = UNSET
    status: str | UnsetType = UNSET
    seq: int | UnsetType = UNSET
    created_at: str | UnsetType = UNSET
    duplicate: bool | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    errors: dict[str, list[str]] | UnsetType = UNSET
    retry_after: float | UnsetType = UNSET
    incident: str | UnsetType = UNSET


class BatchResults(Struct, frozen=True):
    """One for each message, in their order."""

    results: list[BatchResult]


class Alteration(Struct, frozen=True, kw_only=True):
    """What is left out stays as it is; `meta` of null removes it."""

    content: Content | UnsetType = UNSET
    meta: Any = UNSET


class Altered(Struct, frozen=True, kw_only=True):
    id: int
    status: str = "ok"
    seq: int


class PageQuery(Struct, frozen=True, kw_only=True):
    before: Id | None = None
    after: Id | None = None
    limit: PageSize = HISTORY_PAGE


class Membership(Struct, frozen=True, kw_only=True):
    """What is left out stays as it is. `muted_until`: an RFC 3339 moment, or null."""

    role: Annotated[str, Meta(min_length=1, max_length=32)] | UnsetType | None = UNSET
    muted_until: str | UnsetType | None = UNSET


class Done(Struct, frozen=True):
    status: str = "ok"


class TokenRequest(Struct, frozen=True, kw_only=True):
    """`ttl` in seconds; `conversations` that the token opens without a membership."""

    user_id: Id
    ttl: Annotated[int, Meta(ge=1, le=366 * 24 * 3600)] | None = None
    conversations: list[Id] | None = None


class Token(Struct, frozen=True):
    token: str
    expires_in: int


def answer(body: Any, status: int = 200) -> Response:
    # The newline is for people: a shell prompt does not stick to the answer.
    return Response(msgspec.json.encode(body) + b"\n", status, content_type="application/json")


async def posted(kind: type[S]) -> S:
    """The request's body. Raises NotJSON (400), BadRequest (422) with every field that is wrong."""
    return decode(kind, await request.get_data(cache=False, as_text=False), sent_as=request.mimetype)


def decode(kind: type[S], raw: str | bytes | msgspec.Raw, *, sent_as: str = "application/json") -> S:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        if len(raw if isinstance(raw, str) else memoryview(raw)) > EXPLAIN_BYTES:
            field = field_of(error)
            raise _refuse({field: [f"The {field} field {reason(error)}."]} if field else {}) from None
        raise _explain(kind, raw, sent_as) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _not_json(sent_as) from None


def asked(kind: type[S]) -> S:
    """The query string's parameters."""
    given = request.args.to_dict()
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError:
        raise _refuse(mistakes(kind, given, strict=False)) from None


def check_id(name: str, value: int) -> int:
    if not 1 <= value <= MAX_ID:
        raise BadRequest(f"The {name} is no id.", field=name)
    return value


def _explain(kind: type[Struct], raw: str | bytes | msgspec.Raw, sent_as: str) -> BadRequest:
    try:
        data = msgspec.json.decode(raw)
    except msgspec.ValidationError:
        return BadRequest("The body holds a number that is out of range.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _not_json(sent_as)
    if not isinstance(data, dict):
        return BadRequest("The body must be a JSON object.")
    return _refuse(mistakes(kind, data))


def _not_json(sent_as: str) -> NotJSON:
    hint = f" It was sent as {sent_as}." if sent_as and "json" not in sent_as else ""
    return NotJSON("The body is no JSON." + hint)


def _refuse(errors: dict[str, list[str]]) -> BadRequest:
    sentences = [sentence for found in errors.values() for sentence in found]
    return BadRequest(sentences[0] if sentences else "The request is not valid.", errors=errors)
