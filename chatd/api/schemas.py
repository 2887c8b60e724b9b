"""The structs of requests and answers, and the functions that decode and encode them. The OpenAPI description
is generated from the structs.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from quart import Response, request

from chatd.chat.posts import POST_BYTES, decode, refuse
from chatd.core.errors import BadRequest
from chatd.core.ids import id_of, noun_of
from chatd.core.lenient import soften
from chatd.core.limits import BATCH_MESSAGES, HISTORY_PAGE
from chatd.core.model import timestamp
from chatd.core.protocol import Content, Id, PageSize
from chatd.core.validation import mistakes
from chatd.store.read.members import Member
from chatd.store.read.snapshots import Cursor

S = TypeVar("S", bound=Struct)

BODY_BYTES = POST_BYTES  # the limit of a request's body, except for a batch
BODY_SECONDS = 10  # seconds in which a body must arrive
RESPONSE_SECONDS = 10  # seconds in which the client must read the answer


class Incomplete(BadRequest):
    """The connection ended before the body was complete, or the body is not valid HTTP."""

    status = 400


class BodyTooSlow(BadRequest):
    status = 408


class Stored(Struct, frozen=True, kw_only=True):
    """A message that is committed. An exact retry gets the `id` and `seq` of the first attempt."""

    id: int
    status: str = "ok"
    seq: int
    created_at: str
    duplicate: bool | UnsetType = UNSET


class Batch(Struct, frozen=True):
    messages: Annotated[list[msgspec.Raw], Meta(max_length=BATCH_MESSAGES)]


class BatchResult(Struct, frozen=True, kw_only=True):
    """For an accepted message the fields of `Stored`, for a refused one those of `Error`."""

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
    """The result for each message."""

    results: list[BatchResult]


class Alteration(Struct, frozen=True, kw_only=True):
    """The changes of a message."""

    content: Content | None = None
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
    """The properties of a membership. A field that you leave out keeps its value."""

    role: Annotated[str, Meta(min_length=1, max_length=32)] | UnsetType | None = UNSET
    muted_until: str | float | UnsetType | None = UNSET


class Removal(Struct, frozen=True, kw_only=True):
    """How a member is removed. Only `PUT` restores a removed member, banned or not."""

    ban: bool | None = False


class ConversationState(Struct, frozen=True, kw_only=True):
    """The state of a conversation. If it has more than `limits.members_detail` members, `members` has only the
    first of them, and `receipts` and `online` are empty.
    """

    conversation_id: int
    seq: int
    members: list[Member]
    members_count: int
    receipts: list[Cursor]
    online: list[int]
    online_count: int


class CustomEvent(Struct, frozen=True, kw_only=True):
    """An event of your own."""

    event: Annotated[str, Meta(min_length=1, max_length=64)]
    data: Any = None
    user_ids: Annotated[list[Id], Meta(max_length=1000)] | None = None


class Disconnection(Struct, frozen=True, kw_only=True):
    """How the connections are closed."""

    reconnect: bool | None = False


class Disconnected(Struct, frozen=True, kw_only=True):
    status: str = "ok"
    closed: int


class Revocation(Struct, frozen=True, kw_only=True):
    """Which tokens become void."""

    before: str | float | None = None


class Ban(Struct, frozen=True, kw_only=True):
    """How long the user is banned."""

    until: str | float | None = None


class Done(Struct, frozen=True):
    status: str = "ok"


class TokenRequest(Struct, frozen=True, kw_only=True):
    """The user for whom chatd issues a token, and the token's properties."""

    user_id: Id
    ttl: Annotated[int, Meta(ge=1, le=366 * 24 * 3600)] | None = None
    conversations: list[Id] | None = None


class Token(Struct, frozen=True):
    token: str
    expires_in: int


def answer(body: Any, status: int = 200) -> Response:
    # With the newline a shell prompt after `curl` begins on a new line.
    return Response(msgspec.json.encode(body) + b"\n", status, content_type="application/json")


async def posted(kind: type[S]) -> S:
    """Decode the request's body. Raises NotJSON (400), or BadRequest (422) with every field that is wrong."""
    raw = await request.get_data(cache=False, as_text=False)
    assert isinstance(raw, bytes)
    return decode(kind, raw, sent_as=request.mimetype)


async def posted_or_empty(kind: type[S]) -> S:
    """Decode a body that may be left out, because each of its fields has a default. Raises as `posted`."""
    return await posted(kind) if await request.get_data() else kind()


def asked(kind: type[S]) -> S:
    """Decode the parameters of the query string. Raises BadRequest."""
    given = soften(kind, request.args.to_dict())
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError:
        raise refuse(mistakes(kind, given, strict=False)) from None


def moment(field: str, given: str | float) -> str:
    """Convert an RFC 3339 time, or unix seconds, to chatd's form. A time without a zone is in UTC.

    Raises BadRequest.
    """
    try:
        found = datetime.fromisoformat(given) if isinstance(given, str) else datetime.fromtimestamp(given, UTC)
        return timestamp(found if found.tzinfo else found.replace(tzinfo=UTC))
    except (ValueError, OverflowError, OSError):
        raise BadRequest("Write unix seconds, or a time such as 2026-01-01T00:00:00Z.", field=field) from None


def check_id(name: str, text: str) -> int:
    """Convert an id in the path. Raises BadRequest."""
    if (found := id_of(text)) is None:
        noun = noun_of(text)
        mistake = "is not a valid id" if noun == "text" else f"must be an integer, not {noun}"
        raise BadRequest(f"The {name} {mistake}.", field=name)
    return found
