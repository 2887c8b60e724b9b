"""`/api/ws/messages`: post one message or many, edit, delete, and see the delivery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import trio
from msgspec import UNSET
from quart import Blueprint, Response
from quart_schema import document_request, document_response

from chatd.api.errors import body_of
from chatd.api.schemas import Alteration, Altered, Batch, BatchResults, Stored, answer, check_id, posted
from chatd.chat.chat import Chat
from chatd.chat.posts import NewMessage, check_visible, create, decode
from chatd.chat.receipts import Delivery
from chatd.core.errors import BadRequest, ChatError
from chatd.core.limits import CLIENT_ID_CHARS
from chatd.store.write.commands import Create, Created
from chatd.store.write.packing import pack

BATCH_BYTES = 4 * 1024 * 1024  # decoding more would keep the loop busy for over 10 ms
BATCH_PATH = "/api/ws/messages/batch"
YIELD_EVERY = 20  # messages of a batch that are checked between checkpoints: an invalid one takes about 100 µs


def blueprint(chat: Chat) -> Blueprint:
    routes = Blueprint("messages", __name__, url_prefix="/api/ws/messages")

    @routes.post("")
    @document_request(NewMessage)
    @document_response(Stored)
    async def post() -> Response:
        """Store a message and deliver it to everybody in its conversation.

        chatd creates the conversation if it does not exist, and makes the sender a member. A retry with the
        same `client_id`, or with the same `Idempotency-Key` header, never makes a second message.
        """
        raise AssertionError("`ChatApp.hot` answers this route; this function only describes it")

    @routes.post("/batch")
    @document_request(Batch)
    @document_response(BatchResults)
    async def post_batch() -> Response:
        """Store up to 1,000 messages, usually in one commit.

        chatd accepts or refuses each message on its own.
        """
        batch = await posted(Batch)
        commands: list[Create | ChatError] = []
        for count, raw in enumerate(batch.messages, 1):
            commands.append(_checked(chat, raw))
            if count % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
        outcomes = await chat.messages.post_all(commands)
        return answer({"results": [_result(outcome) for outcome in outcomes]})

    @routes.patch("/<id:message_id>")
    @document_request(Alteration)
    @document_response(Altered)
    async def edit(message_id: str) -> Response:
        """Change the content or the `meta` of any message."""
        body = await posted(Alteration)
        content = UNSET if body.content is None else body.content
        if body.content is not None:
            check_visible(body.content)
        changed = await chat.messages.edit(check_id("id", message_id), content, body.meta)
        return answer(Altered(id=changed.id, seq=changed.seq))

    @routes.delete("/<id:message_id>")
    @document_response(Altered)
    async def delete(message_id: str) -> Response:
        """Delete any message.

        chatd removes its content and keeps its place in the conversation.
        """
        changed = await chat.messages.delete(check_id("id", message_id))
        return answer(Altered(id=changed.id, seq=changed.seq))

    @routes.get("/<id:message_id>/delivery")
    @document_response(Delivery)
    async def delivery(message_id: str) -> Response:
        """The users who have read or received a message, those who are online, and those who need a push."""
        return answer(await chat.receipts.delivery(check_id("id", message_id)))

    return routes


def check_key(lines: Sequence[bytes]) -> str | None:
    """Return the `Idempotency-Key`, which serves as a `client_id`. `lines`: the values of all such headers.
    Raises BadRequest if there are several, or if the key is too long or empty.
    """
    if not lines:
        return None
    key = lines[0].decode("latin-1")
    if len(lines) > 1:
        raise BadRequest("There is more than one Idempotency-Key header.", field="Idempotency-Key")
    if not 1 <= len(key) <= CLIENT_ID_CHARS:
        raise BadRequest(f"The key must have 1 to {CLIENT_ID_CHARS} characters.", field="Idempotency-Key")
    return key


def _checked(chat: Chat, raw: msgspec.Raw) -> Create | ChatError:
    try:
        command = create(decode(NewMessage, raw))
        chat.messages.check(command)
    except ChatError as refusal:
        return refusal
    return pack(command)  # to save memory: up to a thousand of them wait for the writer


def stored(created: Created) -> Stored:
    duplicate = True if created.duplicate else UNSET
    return Stored(id=created.id, seq=created.seq, created_at=created.created_at, duplicate=duplicate)


def _result(outcome: Created | ChatError) -> Stored | dict[str, Any]:
    """Return a result in the form of `BatchResult`."""
    return body_of(outcome) if isinstance(outcome, ChatError) else stored(outcome)
