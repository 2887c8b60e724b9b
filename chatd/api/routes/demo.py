"""The demo's routes: the chat page, and a token for anybody who asks. They exist only with `--demo`, and only
on a loopback address.
"""

from __future__ import annotations

from msgspec import Struct
from quart import Blueprint, Response
from quart_schema import hide

from chatd.api.pages import serve_files
from chatd.api.schemas import answer, asked
from chatd.chat.chat import Chat
from chatd.config import Config, split_bind
from chatd.core.protocol import Id

TTL = 3600  # seconds; the page requests a new token before the old one expires
CLIENT = ("chatd", "chatd-link", "chatd-room")
PAGE = ("app", "composer", "conversation", "messages", "shared", "status")
FILES = {
    "/": "demo/index.html",
    "/style.css": "demo/style.css",
    **{f"/{name}.js": f"client/{name}.js" for name in CLIENT},
    **{f"/{name}.js": f"demo/{name}.js" for name in PAGE},
}
OPEN_PATHS = frozenset([*FILES, "/demo/token", "/favicon.ico"])  # browsers get 404 for the last, not 401


class Who(Struct, frozen=True):
    user: Id


def blueprint(chat: Chat, config: Config) -> Blueprint:
    routes = Blueprint("demo", __name__)
    _, port = split_bind(config.hub.bind)
    serve_files(routes, FILES, sockets=f"ws://localhost:{port} ws://127.0.0.1:{port}")

    @routes.get("/demo/token")
    @hide
    async def token() -> Response:
        user_id = asked(Who).user
        return answer(
            {
                "token": chat.tokens.issue(user_id, TTL),
                "expires_in": TTL,
                "user_id": user_id,
                "websocket_port": port,
            }
        )

    return routes
