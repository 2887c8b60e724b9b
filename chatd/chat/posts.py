"""The JSON object with which a backend posts a message over HTTP, in a batch, and in `chat.ingest`. No I/O."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from chatd.core.errors import BadRequest, NotJSON
from chatd.core.model import DEFAULT_TYPE
from chatd.core.protocol import ClientId, Content, Id, TypeName, field_of
from chatd.core.validation import mistakes, reason
from chatd.store.write.commands import Create

S = TypeVar("S", bound=Struct)

POST_BYTES = 256 * 1024  # largest JSON of one message
EXPLAIN_BYTES = 64 * 1024  # for a longer body only the first mistake is reported: decoding it again is too slow


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
    """The command for a posted message. `key` is its idempotency key if it has no `client_id`."""
    return Create(
        conversation_id=message.conversation_id,
        user_id=message.sender_id,
        content=message.content,
        type=message.type or DEFAULT_TYPE,
        meta=message.meta,
        client_id=message.client_id or key,
        reply_to=message.reply_to,
    )


def decode(kind: type[S], raw: str | bytes | msgspec.Raw, *, sent_as: str = "application/json") -> S:
    """Decode a body. `sent_as` is its Content-Type, for the message of NotJSON.

    Raises NotJSON (400), BadRequest (422) with every field that is wrong.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        if len(raw if isinstance(raw, str) else memoryview(raw)) > EXPLAIN_BYTES:
            field = field_of(error)
            raise refuse({field: [f"The {field} field {reason(error)}."]} if field else {}) from None
        raise _explain(kind, raw, sent_as) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _not_json(sent_as) from None


def refuse(errors: dict[str, list[str]]) -> BadRequest:
    """One error for `{field: [sentence, …]}`."""
    sentences = [sentence for found in errors.values() for sentence in found]
    return BadRequest(sentences[0] if sentences else "The request is not valid.", errors=errors)


def _explain(kind: type[Struct], raw: str | bytes | msgspec.Raw, sent_as: str) -> BadRequest:
    try:
        data = msgspec.json.decode(raw)
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
