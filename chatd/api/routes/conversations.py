"""`/api/ws/conversations`: the state of a conversation, its messages, members and custom events."""

from __future__ import annotations

from quart import Blueprint, Response
from quart_schema import document_querystring, document_request, document_response

from chatd.api.schemas import (
    ConversationState,
    CustomEvent,
    Done,
    Membership,
    PageQuery,
    Removal,
    answer,
    asked,
    check_id,
    moment,
    posted,
    posted_or_empty,
)
from chatd.chat.chat import Chat
from chatd.chat.members import check_role
from chatd.store.read.lookups import Page


def blueprint(chat: Chat) -> Blueprint:
    routes = Blueprint("conversations", __name__, url_prefix="/api/ws/conversations")

    @routes.get("/<id:conversation_id>")
    @document_response(ConversationState)
    async def get(conversation_id: str) -> Response:
        """The newest change of a conversation, its members, how far they have read, and who is online."""
        id = check_id("conversation_id", conversation_id)
        found, online = await chat.conversations.get(id)
        return answer(
            ConversationState(
                conversation_id=id,
                seq=found.seq,
                members=found.members,
                members_count=len(found.member_ids),
                receipts=found.receipts,
                online=[] if found.crowded else online,
                online_count=len(online),
            )
        )

    @routes.get("/<id:conversation_id>/messages")
    @document_querystring(PageQuery)
    @document_response(Page)
    async def history(conversation_id: str) -> Response:
        """A page of messages, in ascending id.

        It holds the newest messages, or those next to the message `before` or `after`.
        """
        query = asked(PageQuery)
        place = check_id("conversation_id", conversation_id)
        return answer(await chat.messages.history(place, query.before, query.after, query.limit))

    @routes.put("/<id:conversation_id>/members/<id:user_id>")
    @document_request(Membership)
    @document_response(Done)
    async def add_member(conversation_id: str, user_id: str) -> Response:
        """Add a member, restore a removed one, or change a role or a mute.

        A field that you leave out keeps its value. Live connections see the change within a second.
        """
        body = await posted_or_empty(Membership)
        check_role(body.role or None)
        muted = body.muted_until
        muted = moment("muted_until", muted) if isinstance(muted, str | float) else muted
        await chat.members.add(
            check_id("conversation_id", conversation_id),
            check_id("user_id", user_id),
            role=body.role,
            muted_until=muted,
        )
        return answer(Done())

    @routes.delete("/<id:conversation_id>/members/<id:user_id>")
    @document_querystring(Removal)
    @document_request(Removal)
    @document_response(Done)
    async def remove_member(conversation_id: str, user_id: str) -> Response:
        """Remove a member.

        Within a second the live connections of that user get no more events of the conversation.
        """
        ban = asked(Removal).ban or (await posted_or_empty(Removal)).ban
        place, user = check_id("conversation_id", conversation_id), check_id("user_id", user_id)
        await chat.members.remove(place, user, ban=bool(ban))
        return answer(Done())

    @routes.post("/<id:conversation_id>/events")
    @document_request(CustomEvent)
    @document_response(Done)
    async def send_event(conversation_id: str) -> Response:
        """Send an event of your own to everybody who is in the room at this moment.

        chatd does not store it.
        """
        body = await posted(CustomEvent)
        place = check_id("conversation_id", conversation_id)
        chat.events.send(place, body.event, body.data, body.user_ids)
        return answer(Done())

    return routes
