"""An example request and answer for each route of the description. A test sends them in this order."""

from __future__ import annotations

from typing import Any, NamedTuple


class Example(NamedTuple):
    answer: Any
    body: Any = None  # the request's body; None: no body is sent
    query: str = ""


_AT = "2026-01-01T00:00:00.000000Z"
_DONE = {"status": "ok"}
_MESSAGE = {
    "conversation_id": 1,
    "id": 1,
    "user_id": 5,
    "type": "text",
    "content": "Hello",
    "meta": None,
    "created_at": _AT,
    "seq": 1,
    "client_id": "order-17",
}
_API = "/api/ws"
_MEMBER = f"{_API}/conversations/{{conversation_id}}/members/{{user_id}}"

EXAMPLES: dict[tuple[str, str], Example] = {
    ("POST", f"{_API}/messages"): Example(
        body={"conversation_id": 1, "sender_id": 5, "content": "Hello", "client_id": "order-17"},
        answer={"id": 1, "status": "ok", "seq": 1, "created_at": _AT},
    ),
    ("POST", f"{_API}/messages/batch"): Example(
        body={
            "messages": [
                {"conversation_id": 1, "sender_id": 7, "content": "Hi"},
                {"conversation_id": 1, "sender_id": 0, "content": "Nobody"},
            ]
        },
        answer={
            "results": [
                {"id": 2, "status": "ok", "seq": 2, "created_at": _AT},
                {
                    "message": "The sender_id field must be at least 1.",
                    "code": "bad_request",
                    "errors": {"sender_id": ["The sender_id field must be at least 1."]},
                },
            ]
        },
    ),
    ("GET", f"{_API}/messages/{{message_id}}/delivery"): Example(
        answer={"read": [], "delivered": [], "online": [], "pending": [7]},
    ),
    ("PATCH", f"{_API}/messages/{{message_id}}"): Example(
        body={"content": "Hello, everybody"}, answer={"id": 1, "status": "ok", "seq": 3}
    ),
    ("DELETE", f"{_API}/messages/{{message_id}}"): Example(answer={"id": 1, "status": "ok", "seq": 4}),
    ("GET", f"{_API}/conversations/{{conversation_id}}/messages"): Example(
        query="?limit=1",
        answer={
            "messages": [_MESSAGE | {"id": 2, "user_id": 7, "content": "Hi", "seq": 2, "client_id": None}],
            "has_more": True,
        },
    ),
    ("PUT", _MEMBER): Example(body={"role": "moderator"}, answer=_DONE),
    ("GET", f"{_API}/conversations/{{conversation_id}}"): Example(
        answer={
            "conversation_id": 1,
            "seq": 4,
            "members": [
                {"user_id": 5, "role": "moderator", "muted_until": None},
                {"user_id": 7, "role": None, "muted_until": None},
            ],
            "members_count": 2,
            "receipts": [],
            "online": [],
            "online_count": 0,
        },
    ),
    ("POST", f"{_API}/conversations/{{conversation_id}}/events"): Example(
        body={"event": "call.started", "data": {"by": 5}}, answer=_DONE
    ),
    ("POST", f"{_API}/tokens"): Example(
        body={"user_id": 5, "ttl": 600}, answer={"token": "eyJhbGciOiJI…", "expires_in": 600}
    ),
    ("GET", f"{_API}/users/{{user_id}}"): Example(
        answer={
            "user_id": 5,
            "online": False,
            "connections": 0,
            "conversations": [{"conversation_id": 1, "seq": 4, "unread": 1}],
        },
    ),
    ("POST", f"{_API}/users/{{user_id}}/disconnect"): Example(
        body={"reconnect": True}, answer={"status": "ok", "closed": 0}
    ),
    ("POST", f"{_API}/users/{{user_id}}/revoke"): Example(body={}, answer=_DONE),
    ("PUT", f"{_API}/users/{{user_id}}/ban"): Example(body={"until": "2999-01-01T00:00:00Z"}, answer=_DONE),
    ("DELETE", f"{_API}/users/{{user_id}}/ban"): Example(answer=_DONE),
    ("DELETE", _MEMBER): Example(answer=_DONE),
    ("GET", "/healthz"): Example(answer={"status": "ok"}),
    ("GET", "/readyz"): Example(answer={"status": "ok", "checks": {"database": "ok", "migrations": "ok"}}),
}
