"""The Quart application: its routes, the token check before them, and corrections of Quart's own behaviour."""

from __future__ import annotations

from typing import Any

import trio
from quart import request
from quart_schema import APIKeySecurityScheme, Info, QuartSchema
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody
from werkzeug.routing.converters import IntegerConverter

from chatd import __version__
from chatd.api import errors, health, reference
from chatd.api.access import check_access, check_encoding, check_host
from chatd.api.description import Description
from chatd.api.health import Health
from chatd.api.routes import conversations, demo, messages, status, tokens, users
from chatd.api.routes.messages import BATCH_BYTES, BATCH_PATH
from chatd.api.routes.post_message import Post
from chatd.api.schemas import BODY_BYTES, BODY_SECONDS, RESPONSE_SECONDS, Incomplete
from chatd.chat.chat import Chat
from chatd.config.settings import Settings
from chatd.core.errors import ChatError
from chatd.observe.sampler import Sampler

OPEN_PATHS = status.OPEN_PATHS | reference.OPEN_PATHS | {"/healthz", "/readyz", "/metrics", "/openapi.json"}


class HTTPConnection(TrioASGIHTTPConnection):
    """Passes a request's body to its view. If the body breaks off, only a view that waits for the body fails:
    quart-trio itself cancels the view then, even in the middle of a commit.
    """

    async def handle_messages(  # type: ignore[override]  # quart-trio hands a nursery over
        self, nursery: trio.Nursery, request: Any, receive: Any
    ) -> None:
        body: Body = request.body
        try:
            while not body.is_over:
                event = await receive()
                if event["type"] != "http.request":
                    raise Incomplete("The body is incomplete.")
                body.append(event.get("body", b""))
                if not event.get("more_body", False):
                    body.set_complete()
        except ChatError as error:
            body.break_off(error)

    async def handle_request(  # type: ignore[override]  # quart-trio hands a nursery over
        self, nursery: trio.Nursery, request: Any, send: Any
    ) -> None:
        try:
            await super().handle_request(nursery, request, send)
        finally:
            # If no route was found, the exception refers to the request through its traceback: break the cycle.
            request.routing_exception = None

    def _create_request_from_scope(self, send: Any) -> Any:
        # Quart raises, before any check, where the target of a request is not a path.
        if not self.scope["path"].startswith("/"):
            self.scope["path"] = "/" + self.scope["path"]
        return super()._create_request_from_scope(send)


class Body(TrioBody):
    """A request's body, which can end with a ChatError."""

    @property
    def is_over(self) -> bool:
        """Whether the body is complete or was refused."""
        return self._complete.is_set() or self._must_raise is not None

    def break_off(self, error: ChatError) -> None:
        self._must_raise = error
        self.set_complete()


class ChatRequest(TrioRequest):
    """A request whose size limit depends on its path: Quart checks it before any view runs."""

    body_class = Body

    def __init__(self, method: str, scheme: str, path: str, *rest: Any, **options: Any) -> None:
        options["max_content_length"] = BATCH_BYTES if path == BATCH_PATH else BODY_BYTES
        super().__init__(method, scheme, path, *rest, **options)


class IdConverter(IntegerConverter):
    """Hands on what stands in the place of an id: a view says better than a 404 what is wrong with it."""

    regex = "[^/]+"

    def to_python(self, value: str) -> Any:
        return value


class ChatApp(QuartTrio):
    asgi_http_class = HTTPConnection
    request_class = ChatRequest
    hot: Post

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"  # Laravel, too, ignores a slash after a path
        if Post.takes(scope):
            await self.hot(scope, receive, send)
            return
        await super().asgi_app(scope, receive, send)


def create_app(settings: Settings, chat: Chat, healthy: Health, sampler: Sampler, node: str) -> ChatApp:
    app = ChatApp("chatd", static_folder=None)
    app.url_map.converters["id"] = IdConverter
    app.hot = Post(chat, settings)
    app.config.update(BODY_TIMEOUT=BODY_SECONDS, RESPONSE_TIMEOUT=RESPONSE_SECONDS)
    _guard(app, settings)
    errors.install(app)
    app.register_blueprint(health.blueprint(healthy))
    app.register_blueprint(status.blueprint(healthy, sampler, node))
    app.register_blueprint(reference.blueprint())
    app.register_blueprint(messages.blueprint(chat))
    app.register_blueprint(conversations.blueprint(chat))
    app.register_blueprint(users.blueprint(chat))
    app.register_blueprint(tokens.blueprint(chat, settings))
    if settings.now.demo:
        app.register_blueprint(demo.blueprint(chat, settings.now))
    QuartSchema(
        app,
        openapi_path="/openapi.json",
        redoc_ui_path=None,
        scalar_ui_path=None,
        swagger_ui_path=None,
        conversion_preference="msgspec",
        info=Info(title="chatd", version=__version__),
        openapi_provider_class=Description,
        security=[{"internal": []}],
        security_schemes={"internal": APIKeySecurityScheme(in_="header", name="X-Internal-Token")},
    )
    return app


def _guard(app: ChatApp, settings: Settings) -> None:
    """Require the token for every path that is not open, including paths that do not exist."""
    open_paths = OPEN_PATHS | demo.OPEN_PATHS if settings.now.demo else OPEN_PATHS

    @app.before_request
    async def check_token() -> None:
        if settings.now.demo:
            check_host(request.headers.get("Host", ""))
        if request.path in open_paths:
            return
        given = request.headers.getlist("X-Internal-Token")
        tokens = [one.encode("utf-8", "surrogateescape") for one in given]
        check_access(settings.now.api, tokens, origin="Origin" in request.headers)
        check_encoding(request.headers.get("Content-Encoding", ""))
