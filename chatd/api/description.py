"""The API's OpenAPI description, for `/openapi.json`, `/docs` and docs/http.md.

quart-schema 0.25 generates it from the routes and their structs. This module adds what is missing there: the
schemas that are referred to, the meaning of each field, the shape of errors, examples, and which routes are
open.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
from msgspec import Struct
from quart_schema.openapi import OpenAPIProvider

from chatd.api.examples import EXAMPLES
from chatd.core.limits import CLIENT_ID_CHARS

Json = dict[str, Any]
REFERENCE = "#/components/schemas/{name}"
OPEN_PATHS = frozenset(["/healthz", "/readyz"])  # the described routes that need no token

# The meaning of each field, by its name; by struct and name where a struct uses the name in another way.
FIELDS = {
    "conversation_id": "The conversation.",
    "user_id": "The user.",
    "sender_id": "The user in whose name you post. The user becomes a member of the conversation.",
    "id": "The message.",
    "content": "The text. `limits.content_chars` bounds it.",
    "type": "The kind of the message, `text` by default. chatd passes it on and does not interpret it.",
    "meta": "Any JSON of your own. chatd stores it and passes it on. `limits.meta_bytes` bounds it.",
    "client_id": "A name that you choose. A retry with the same name creates no second message.",
    "reply_to": "The message that this one answers.",
    "status": "`ok`.",
    "seq": "The number of the change in its conversation: 1, 2, 3 …",
    "created_at": "When chatd stored it, in UTC.",
    "edited_at": "When it was last edited.",
    "deleted_at": "When it was deleted.",
    "duplicate": "Present if this was a retry: the message was stored before.",
    "messages": "The messages.",
    "results": "One result for each message, in their order.",
    "code": "The code of the error.",
    "message": "A sentence that says what went wrong.",
    "errors": "For each field that is wrong, sentences that say what is wrong with it.",
    "retry_after": "Seconds after which a retry may succeed.",
    "incident": "The id of this error in chatd's log.",
    "retryable": "Whether a retry may succeed.",
    "until": "When the ban or mute ends.",
    "role": "`moderator` gives rights over the messages of others. Any other text is a role of your own.",
    "muted_until": "Until when the user may read and not write, in RFC 3339 or unix seconds. `null` ends it.",
    "ban": "Record the removal as a ban.",
    "members": "The members, in ascending id; at most `limits.members_detail` of them.",
    "members_count": "How many members there are.",
    "receipts": "How far each member has read. Empty if there are more than `limits.members_detail` members.",
    "read": "The newest message that the user has read.",
    "delivered": "The newest message that a client of the user has received.",
    "online": "The users who are connected. Empty if there are more than `limits.members_detail` members.",
    "online_count": "How many of them are connected.",
    "event": "The name of your event. Names of the protocol are refused.",
    "data": "Any JSON. chatd passes it to the clients unchanged.",
    "user_ids": "Deliver only to these users. Without it everybody in the room gets the event.",
    "reconnect": "Ask the clients to reconnect. Without it they do not.",
    "closed": "How many connections were closed.",
    "before": "Void tokens that were issued before this moment, in RFC 3339 or unix seconds; now by default.",
    "ttl": "Seconds for which the token is valid. `auth.token_ttl`, if you leave it out.",
    "conversations": "Conversations that the token opens without a membership.",
    "token": "The token.",
    "expires_in": "Seconds until it expires.",
    "connections": "How many connections the user has on all nodes.",
    "has_more": "Whether there are more messages in that direction.",
    "after": "Only messages with a higher id.",
    "limit": "The maximum number of messages.",
    "reactions": "For each emoji, the first users who reacted with it.",
    "reaction_counts": "For each emoji, how many users reacted with it, if `reactions` does not list all.",
    "unread": "How many messages the user has not read; counted up to 1,000.",
    "checks": "The state of each part: `database`, `migrations`, and `redis` if there is one.",
    "Alteration.content": "The new text. Leave it out to keep the text.",
    "Alteration.meta": "The new `meta`; `null` removes it. Leave it out to keep it.",
    "Ban.until": "When the ban ends, in RFC 3339 or unix seconds. Without it the ban has no end.",
    "Batch.messages": "Up to 1,000 messages, each with the fields of `NewMessage`.",
    "Delivery.delivered": "Users whose clients have received the message, the readers included.",
    "Delivery.online": "Users who are connected.",
    "Delivery.pending": "Users who have neither received it nor a connection: they need a push notification.",
    "Delivery.read": "Users who have read the message.",
    "PageQuery.before": "Only messages with a lower id.",
    "ConversationState.seq": "The number of the newest change; 0 if there is none.",
    "Ready.status": "`ok`, `degraded`, `unavailable` or `stopping`.",
    "Unread.seq": "The number of the newest change in that conversation.",
    "User.conversations": "The user's conversations by membership, the most recently active first.",
    "User.online": "Whether the user is connected.",
}

IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": CLIENT_ID_CHARS},
    "description": "Serves as `client_id` if the body has none. Several such headers are refused with 422.",
}


class Error(Struct, frozen=True):
    """The shape of every error."""

    message: str
    code: str
    errors: dict[str, list[str]] | None = None
    retry_after: float | None = None
    incident: str | None = None


class Description(OpenAPIProvider):
    _made: Json | None = None

    def schema(self) -> Json:
        """Return the description. It is generated at the first call, when all routes are registered: that takes
        15 ms.
        """
        self._made = self._made or self._make()
        return self._made

    def _make(self) -> Json:
        found = super().schema()
        found["components"]["schemas"].update(_schemas(Error))
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                _complete(path, method, operation)
        return found

    def build_request_body(self, model: Any, source: Any) -> tuple[Json, Json]:
        return _body(model), _schemas(model)

    def build_response_object(self, model: Any, headers_model: Any) -> tuple[Json, Json]:
        # inspect.getdoc() would return msgspec's own docstring for a struct without one.
        return _body(model) | {"description": inspect.cleandoc(model.__doc__ or "")}, _schemas(model)

    def build_querystring_parameters(self, model: Any) -> tuple[list[Json], Json]:
        fields = _schemas(model)[model.__name__]["properties"]
        return [
            {"name": name, "in": "query", "schema": field, "description": field.pop("description")}
            for name, field in fields.items()
        ], {}


def _complete(path: str, method: str, operation: Json) -> None:
    operation["tags"] = [_noun(path)]
    operation["responses"] = {str(status): answer for status, answer in operation["responses"].items()}
    operation["description"] = operation.get("description", "").strip()
    if path in OPEN_PATHS:
        operation["security"] = []
    else:
        operation["responses"]["default"] = _body(Error) | {"description": "An error."}
    if (method, path) == ("post", "/api/ws/messages"):
        operation["parameters"].append(IDEMPOTENCY_KEY)
    for parameter in operation["parameters"]:
        parameter.setdefault("description", FIELDS.get(parameter["name"], "The message."))
        if parameter["in"] == "path":
            parameter["schema"] |= {"minimum": 1, "maximum": 2**53 - 1}
    example = EXAMPLES.get((method.upper(), path))
    if example and example.body is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = example.body
    if example:
        operation["responses"]["200"]["content"]["application/json"]["example"] = example.answer


def _noun(path: str) -> str:
    """`/api/ws/messages/{message_id}` → `messages`; `/healthz` → `health`."""
    parts = path.split("/")
    return parts[3] if path.startswith("/api/ws/") else "health"


def _body(model: type[Struct]) -> Json:
    schema = {"$ref": REFERENCE.format(name=model.__name__)}
    return {"content": {"application/json": {"schema": schema}}}


def _schemas(model: type[Struct]) -> Json:
    """Return the schemas of a struct and of the structs that it refers to, by name, with field descriptions."""
    _, found = msgspec.json.schema_components([model], ref_template=REFERENCE)
    for name, schema in found.items():
        schema["description"] = inspect.cleandoc(schema.get("description", ""))
        for field, value in schema["properties"].items():
            value["description"] = FIELDS.get(f"{name}.{field}") or FIELDS[field]
    return found
