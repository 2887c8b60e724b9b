"""`/api/ws/conversations`: history and members."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec import UNSET, UnsetType
from quart import Blueprint, Response, request
from quart_schema import document_querystring, document_request, document_response

from chatd.api.bodies import Done, Membership, PageQuery, answer, asked, check_id, posted
from chatd.chat import Chat
from chatd.errors import BadRequest
from chatd.model import timestamp
from chatd.protocol import check_label
from chatd.store.reads import Page


def blueprint(chat: Chat) -> Blueprint:
    routes = Blueprint("conversations", __name__, url_prefix="/api/ws/conversations")

    @routes.get("/<int:conversation_id>/messages")
    @document_querystring(PageQuery)
    @document_response(Page)
    async def history(conversation_id: int) -> Response:
        """A page of messages in ascending id: the newest, or next to `before` or `after` (message ids)."""
        query = asked(PageQuery)
        check_id("conversation_id", conversation_id)
        return answer(await chat.messages.history(conversation_id, query.before, query.after, query.limit))

    @routes.put("/<int:conversation_id>/members/<int:user_id>")
    @document_request(Membership)
    @document_response(Done)
    async def add_member(conversation_id: int, user_id: int) -> Response:
        """Add a member, bring a removed one back, or change a role or a mute."""
        body = await posted(Membership) if (await request.get_data()) else Membership()
        check_label("role", body.role or None)
        await chat.members.add(
            check_id("conversation_id", conversation_id),
            check_id("user_id", user_id),
            role=body.role,
            muted_until=_moment(body.muted_until),
        )
        return answer(Done())

    @routes.delete("/<int:conversation_id>/members/<int:user_id>")
    @document_response(Done)
    async def remove_member(conversation_id: int, user_id: int) -> Response:
        """Remove a member: live connections hear no more of the conversation within a second."""
        await chat.members.remove(check_id("conversation_id", conversation_id), check_id("user_id", user_id))
        return answer(Done())

    return routes


def _moment(text: str | UnsetType | None) -> str | UnsetType | None:
    if text is None or text is UNSET:
        return text
    try:
        moment = datetime.fromisoformat(str(text))
        return timestamp(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise BadRequest("Write a moment as 2026-01-01T00:00:00Z.", field="muted_until") from None
