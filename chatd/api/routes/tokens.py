"""`/api/ws/tokens`: issues a token for a user whom the backend has authenticated."""

from __future__ import annotations

from quart import Blueprint, Response
from quart_schema import document_request, document_response

from chatd.api.schemas import Token, TokenRequest, answer, posted
from chatd.chat.chat import Chat
from chatd.config.settings import Settings


def blueprint(chat: Chat, settings: Settings) -> Blueprint:
    routes = Blueprint("tokens", __name__, url_prefix="/api/ws/tokens")

    @routes.post("")
    @document_request(TokenRequest)
    @document_response(Token)
    async def issue() -> Response:
        """Issue a token with which a user can connect."""
        body = await posted(TokenRequest)
        ttl = body.ttl or settings.now.auth.token_ttl
        # Issued "after" a revocation in this same second. Otherwise the token would be void for up to a second.
        since = await chat.users.issue_from(body.user_id)
        return answer(Token(chat.tokens.issue(body.user_id, ttl, body.conversations, since=since), ttl))

    return routes
