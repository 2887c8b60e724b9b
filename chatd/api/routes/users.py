"""`/api/ws/users`: a user's presence and unread messages; disconnect, revoke tokens, ban."""

from __future__ import annotations

import time
from datetime import datetime

from quart import Blueprint, Response
from quart_schema import document_request, document_response

from chatd.api.schemas import (
    Ban,
    Disconnected,
    Disconnection,
    Done,
    Revocation,
    answer,
    check_id,
    moment,
    posted_or_empty,
)
from chatd.chat.chat import Chat
from chatd.chat.users import User
from chatd.core.errors import BadRequest
from chatd.core.model import FOR_EVER

AHEAD = 60  # seconds that a backend's clock may be ahead of chatd's
MOST_SECONDS = 253402300799  # FOR_EVER as unix seconds


def blueprint(chat: Chat) -> Blueprint:
    routes = Blueprint("users", __name__, url_prefix="/api/ws/users")

    @routes.get("/<id:user_id>")
    @document_response(User)
    async def get(user_id: str) -> Response:
        """Whether a user is online, and how many messages of each conversation the user has not read."""
        return answer(await chat.users.get(check_id("user_id", user_id)))

    @routes.post("/<id:user_id>/disconnect")
    @document_request(Disconnection)
    @document_response(Disconnected)
    async def disconnect(user_id: str) -> Response:
        """Close all connections of a user.

        The user's tokens stay valid. To void them, use `revoke`.
        """
        body = await posted_or_empty(Disconnection)
        closed = chat.users.disconnect(check_id("user_id", user_id), reconnect=bool(body.reconnect))
        return answer(Disconnected(closed=closed))

    @routes.post("/<id:user_id>/revoke")
    @document_request(Revocation)
    @document_response(Done)
    async def revoke(user_id: str) -> Response:
        """Void the tokens that were issued before a given time.

        chatd closes the connections that were made with them.
        """
        body = await posted_or_empty(Revocation)
        await chat.users.revoke(check_id("user_id", user_id), _seconds(body.before))
        return answer(Done())

    @routes.put("/<id:user_id>/ban")
    @document_request(Ban)
    @document_response(Done)
    async def ban(user_id: str) -> Response:
        """Ban a user from all conversations, until a given time or for ever.

        chatd closes the user's connections.
        """
        body = await posted_or_empty(Ban)
        until = FOR_EVER if body.until is None else moment("until", body.until)
        await chat.users.ban(check_id("user_id", user_id), until)
        return answer(Done())

    @routes.delete("/<id:user_id>/ban")
    @document_response(Done)
    async def unban(user_id: str) -> Response:
        """End a ban."""
        await chat.users.ban(check_id("user_id", user_id), None)
        return answer(Done())

    return routes


def _seconds(before: str | float | None) -> float | None:
    if isinstance(before, str):
        before = datetime.fromisoformat(moment("before", before)).timestamp()
    if before is not None and not 0 <= before <= MOST_SECONDS:
        raise BadRequest("Write unix seconds, or a time such as 2026-01-01T00:00:00Z.", field="before")
    if before is not None and before > time.time() + AHEAD:
        raise BadRequest(
            "This time is in the future: only tokens that are already issued can be revoked.", field="before"
        )
    return before
