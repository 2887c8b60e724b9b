"""The JSON object with which a backend posts a message over HTTP, in a batch, and in `chat.ingest`. No I/O."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from chatd.core.errors import BadRequest, NotJSON
from chatd.core.forms import is_form, read_form
from chatd.core.lenient import soften
from chatd.core.model import DEFAULT_TYPE
from chatd.core.protocol import ClientId, Content, Id, TypeName, field_of
from chatd.core.validation import mistakes, reason
from chatd.store.write.commands import Create

S = TypeVar("S", bound=Struct)

POST_BYTES = 256 * 1024  # largest JSON of one message
EXPLAIN_BYTES = 64 * 1024  # for a longer body only the first mistake is reported: decoding it again is too slow

# An object, field by field: what is not looked at is not read.
_unread = msgspec.json.Decoder(dict[str, msgspec.Raw] | list[msgspec.Raw])


class NewMessage(Struct, frozen=True, kw_only=True):
    """A message that a backend posts."""

    conversation_id: Id
    sender_id: Id
    content: Content
    type: TypeName | None = None
    meta: Any = None
    client_id: ClientId | None = None
    reply_to: Id | None = None


def create(message: NewMessage, key: str | None = None) -> Create:
    """Return the command for a posted message. `key` is its idempotency key if it has no `client_id`.

    Raises BadRequest for content of spaces alone.
    """
    check_visible(message.content)
    return Create(
        conversation_id=message.conversation_id,
        user_id=message.sender_id,
        content=message.content,
        type=message.type or DEFAULT_TYPE,
        meta=message.meta,
        client_id=message.client_id or key,
        reply_to=message.reply_to,
    )


def check_visible(content: str) -> None:
    """Raises BadRequest for content of spaces alone, which Laravel's rule `required` refuses, too.

    It is a rule for backends. A client may send spaces, for instance beside a `meta`.
    """
    if not content.strip():
        raise BadRequest("The content field must not be empty.", field="content")


def decode(kind: type[S], raw: bytes | msgspec.Raw, *, sent_as: str = "application/json") -> S:
    """Decode a body. `sent_as` is its Content-Type.

    The strict decoder comes first. Only a body that it refuses is read as PHP may have meant it, or as a form.
    Raises NotJSON (400), BadRequest (422) with every field that is wrong.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        try:
            return _again(kind, soften(kind, _unread.decode(raw)))
        except (msgspec.DecodeError, RecursionError):
            raise _explained(kind, raw, sent_as, error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if is_form(sent_as) and bytes(raw)[:1] not in (b"{", b"["):
            return _from_form(kind, bytes(raw))
        raise _not_json(sent_as) from None


def _again(kind: type[S], softened: Any) -> S:
    """Let the strict decoder check the softened data."""
    return msgspec.json.decode(msgspec.json.encode(softened), type=kind)


def _from_form(kind: type[S], body: bytes) -> S:
    data = soften(kind, read_form(body))
    try:
        return _again(kind, data)
    except msgspec.ValidationError:
        raise refuse(mistakes(kind, data)) from None


def refuse(errors: dict[str, list[str]]) -> BadRequest:
    """One error for `{field: [sentence, …]}`."""
    sentences = [sentence for found in errors.values() for sentence in found]
    if not sentences:
        return BadRequest("The request is not valid.")
    return BadRequest(sentences[0] + _and_more(len(sentences) - 1), errors=errors)


def _and_more(count: int) -> str:
    """As Laravel ends the message of a failed validation."""
    return f" (and {count} more error{'s' if count > 1 else ''})" if count else ""


def _explained(
    kind: type[Struct], raw: bytes | msgspec.Raw, sent_as: str, error: msgspec.ValidationError
) -> BadRequest:
    """`error` is what the strict decoder said."""
    if len(memoryview(raw)) > EXPLAIN_BYTES:
        field = field_of(error)
        return refuse({field: [f"The {field} field {reason(error)}."]} if field else {})
    try:
        data = soften(kind, msgspec.json.decode(raw))
    except msgspec.ValidationError:
        return BadRequest("The body holds a number that is out of range.")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _not_json(sent_as)
    if not isinstance(data, dict):
        return BadRequest("The body must be a JSON object.")
    return refuse(mistakes(kind, data))


def _not_json(sent_as: str) -> NotJSON:
    hint = f" It was sent as {sent_as}." if sent_as and "json" not in sent_as else ""
    return NotJSON("The body is not valid JSON." + hint)
