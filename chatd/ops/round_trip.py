"""A round trip: posts to the HTTP API as a backend does, receives it on a WebSocket as a client, and measures
the time.

It uses the reserved room and user limits.OPERATOR. It sends a custom event, which chatd does not store, or a
message with `write`. The token lists the room, so that the user need not be a member.
"""

from __future__ import annotations

import secrets
from functools import partial
from statistics import median
from typing import Any

import trio

from chatd.core.errors import OperatorError
from chatd.core.limits import OPERATOR
from chatd.ops.api import Answer, ApiClient
from chatd.ops.client import Connection, Disconnected, connect
from chatd.ops.finding import Case

TRIPS = 5  # the result is their median
PATIENCE = 5.0  # seconds for one trip
TOKEN_SECONDS = 60
EVENT = "chatd.doctor"
ROOM = f"/api/ws/conversations/{OPERATOR}"
MESSAGES = "/api/ws/messages"


class NoToken(OperatorError):
    """chatd issues no tokens with this configuration, so the check cannot log in."""


async def travel(case: Case, url: str) -> float:
    """Return the seconds from the start of a post to its arrival on a WebSocket of `url`.

    Raises OperatorError, Disconnected, or NoToken if the check cannot log in.
    """
    backend = ApiClient(case.config)
    token = await _token(backend)
    async with connect(url) as connection:
        ready = await connection.request("auth", token=token, rooms={str(OPERATOR): None})
        if str(OPERATOR) not in ready.get("rooms", {}):
            raise OperatorError(
                f"chatd refuses the login: {ready.get('message', 'the user may not enter the room')}"
            )
        if case.write:
            return await _message(backend, connection)
        return median([await _event(backend, connection) for _ in range(TRIPS)])


async def _token(backend: ApiClient) -> str:
    body = {"user_id": OPERATOR, "ttl": TOKEN_SECONDS, "conversations": [OPERATOR]}
    answer = await _ask(backend, "POST", "/api/ws/tokens", body)
    if answer.status == 403:
        raise NoToken(answer.json.get("message", "chatd issues no token"))
    return str(_accepted(answer)["token"])


async def _event(backend: ApiClient, connection: Connection) -> float:
    mark = secrets.token_hex(8)
    begun = trio.current_time()
    body = {"event": EVENT, "data": mark, "user_ids": [OPERATOR]}
    _accepted(await _ask(backend, "POST", f"{ROOM}/events", body))
    return await _arrival(connection, "data", mark) - begun


async def _message(backend: ApiClient, connection: Connection) -> float:
    """Post a message and delete it afterwards. A deleted message without text stays in the room."""
    mark = secrets.token_hex(8)
    begun = trio.current_time()
    body = {"conversation_id": OPERATOR, "sender_id": OPERATOR, "content": "chatd doctor", "client_id": mark}
    posted = _accepted(await _ask(backend, "POST", MESSAGES, body))
    try:
        return await _arrival(connection, "client_id", mark) - begun
    finally:
        with trio.CancelScope(shield=True):  # the client's own deadline limits this
            await _ask(backend, "DELETE", f"{MESSAGES}/{posted['id']}")


async def _arrival(connection: Connection, key: str, mark: str) -> float:
    """Wait for the event with this mark, and return the time of its arrival."""
    with trio.move_on_after(PATIENCE):
        while (await connection.next()).get(key) != mark:
            pass
        return trio.current_time()
    raise Disconnected(f"the post did not arrive in {PATIENCE:.0f} s")


async def _ask(backend: ApiClient, *request: Any) -> Answer:
    return await trio.to_thread.run_sync(partial(backend.ask, *request), abandon_on_cancel=True)


def _accepted(answer: Answer) -> dict[str, Any]:
    if answer.status == 401:
        raise OperatorError("api.internal_token here is not the daemon's")
    if answer.status != 200:
        raise OperatorError(f"chatd refuses the post: {answer.json.get('message', answer.status)}")
    return answer.json
