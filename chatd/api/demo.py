"""The demo's door: the chat page, and a token for whoever asks. On loopback, and only with `--demo`."""

from __future__ import annotations

from importlib import resources

from msgspec import Struct
from quart import Blueprint, Response
from quart_schema import hide

from chatd.api.bodies import answer, asked
from chatd.chat import Chat
from chatd.config import Config, split_bind
from chatd.protocol import Id

TTL = 3600  # seconds; the page asks for a new token before
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
FILES = {"/": "index.html", "/style.css": "style.css"} | {
    f"/{name}.js": f"{name}.js"
    for name in (
        *("app", "chatd", "chatd-link", "chatd-room"),
        *("composer", "conversation", "messages", "shared", "status"),
    )
}
OPEN_PATHS = frozenset([*FILES, "/demo/token", "/favicon.ico"])  # the last: browsers ask, and get 404, not 401


class Who(Struct, frozen=True):
    user: Id


def blueprint(chat: Chat, config: Config) -> Blueprint:
    routes = Blueprint("demo", __name__)
    _, port = split_bind(config.hub.bind)
    headers = _security_headers(port)

    for path, name in FILES.items():
        routes.add_url_rule(
            path, path.strip("/").partition(".")[0] or "page", hide(_file_view(name, headers)), methods=["GET"]
        )

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


def _file_view(name: str, headers: dict[str, str]):  # type: ignore[no-untyped-def]
    content = (resources.files("chatd") / "web" / name).read_bytes()

    async def view() -> Response:
        return Response(
            content, content_type=f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8", headers=headers
        )

    return view


def _security_headers(port: int) -> dict[str, str]:
    sockets = f"ws://localhost:{port} ws://127.0.0.1:{port}"
    return {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            f"connect-src 'self' {sockets}; base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
            "require-trusted-types-for 'script'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
