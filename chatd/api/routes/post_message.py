"""Answers `POST /api/ws/messages` without Quart, because a busy backend uses this route most.

Quart's request context, routing, signals and two tasks cost a third of a millisecond, which is a third of the
time of a post. The module `messages` describes the route for OpenAPI.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import trio

from chatd.api.access import check_access, check_encoding, check_host
from chatd.api.errors import body_of, unforeseen
from chatd.api.routes.messages import check_key, stored
from chatd.api.schemas import BODY_BYTES, BODY_SECONDS, RESPONSE_SECONDS, BodyTooSlow, Incomplete
from chatd.chat.chat import Chat
from chatd.chat.posts import NewMessage, create, decode
from chatd.config.settings import Settings
from chatd.core.errors import ChatError, TooLarge
from chatd.observe import metrics
from chatd.store.write.commands import Created
from chatd.store.write.submission import Submission

PATH = "/api/ws/messages"

Lines = list[tuple[bytes, bytes]]
Headers = dict[bytes, bytes]


class Post:
    """An ASGI application for one route."""

    def __init__(self, chat: Chat, settings: Settings) -> None:
        self._chat, self._settings = chat, settings

    @staticmethod
    def takes(scope: Any) -> bool:
        return bool(scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        began, outcome = trio.current_time(), "ok"
        try:
            status, body, extra = 200, await self._post(scope["headers"], receive), []
        except ChatError as error:
            outcome = error.code
            status, body, extra = error.status, msgspec.json.encode(body_of(error)), _retry_after(error)
        except Exception as error:
            refused = unforeseen(error, "POST", PATH)
            outcome = refused.code
            status, body, extra = refused.status, msgspec.json.encode(body_of(refused)), []
        metrics.POST_SECONDS.labels(outcome).observe(trio.current_time() - began)
        body += b"\n"
        size = b"%d" % len(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", size), *extra]
        # Shielded, because a cancelled write would cut off an answer that the client is reading.
        with trio.move_on_after(RESPONSE_SECONDS, shield=True):
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _post(self, lines: Lines, receive: Any) -> bytes:
        headers = dict(lines)
        if self._settings.now.demo:
            check_host(headers.get(b"host", b"").decode("latin-1"))
        tokens = _values(lines, b"x-internal-token")
        check_access(self._settings.now.api, tokens, origin=b"origin" in headers)
        check_encoding(headers.get(b"content-encoding", b"").decode("latin-1"))
        created = await self._submit(lines, headers, await _body(headers, receive)).outcome()
        assert isinstance(created, Created)
        return msgspec.json.encode(stored(created))

    def _submit(self, lines: Lines, headers: Headers, body: bytes) -> Submission:
        """Submit the message. This is a function of its own so that, while the caller waits for the writer, no
        local variable holds the message, whose memory the writer's queue does not count.
        """
        message = decode(NewMessage, body, sent_as=headers.get(b"content-type", b"").decode("latin-1"))
        return self._chat.messages.submit(create(message, check_key(_values(lines, b"idempotency-key"))))


def _values(lines: Lines, name: bytes) -> list[bytes]:
    return [value for found, value in lines if found == name]


async def _body(headers: Headers, receive: Any) -> bytes:
    if int(headers.get(b"content-length", b"0")) > BODY_BYTES:  # h11 has checked that it is a number
        raise TooLarge("The body is too large.")
    parts: list[bytes] = []
    room, more = BODY_BYTES, True
    with trio.move_on_after(BODY_SECONDS):
        while more:
            event = await receive()
            if event["type"] != "http.request":
                raise Incomplete("The body is incomplete.")
            parts.append(event.get("body", b""))
            room -= len(parts[-1])
            if room < 0:
                raise TooLarge("The body is too large.")
            more = event.get("more_body", False)
        return b"".join(parts)
    raise BodyTooSlow("The body took too long to arrive.")


def _retry_after(error: ChatError) -> list[tuple[bytes, bytes]]:
    if "retry_after" not in error.details:
        return []
    return [(b"retry-after", b"%d" % math.ceil(error.details["retry_after"]))]
