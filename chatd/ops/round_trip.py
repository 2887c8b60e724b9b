"""A round trip: post to the HTTP API as a backend, hear it on a WebSocket as a client, and take the time.

It happens in a room, and by a user, that nobody else has (limits.OPERATOR). Unless a message is wanted it is an
event of our own, which is not stored; the token lists the room, so that no membership is needed.
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

TRIPS = 5  # of which the middle one counts
PATIENCE = 5.0  # seconds for one
TOKEN_SECONDS = 60
EVENT = "chatd.doctor"
ROOM = f"/api/ws/conversations/{OPERATOR}"
MESSAGES = "/api/ws/messages"


class NoToken(OperatorError):
    """chatd issues none here: there is no way for us to log in."""


async def travel(case: Case, url: str) -> float:
    """Seconds from the start of a post to its arrival on a WebSocket of `url`.

    Raises OperatorError, Disconnected; NoToken where we cannot log in.
    """
    backend = ApiClient(case.config)
    token = await _token(backend)
    async with connect(url) as connection:
        ready = await connection.request("auth", token=token, rooms={str(OPERATOR): None})
        if str(OPERATOR) not in ready.get("rooms", {}):
            raise OperatorError(f"the login is refused: {ready.get('message', 'the room is closed to it')}")
        if case.write:
            return await _message(backend, connection)
        return median([await _event(backend, connection) for _ in range(TRIPS)])


async def _token(backend: ApiClient) -> str:
    body = {"user_id": OPERATOR, "ttl": TOKEN_SECONDS, "conversations": [OPERATOR]}
    answer = await _ask(backend, "POST", "/api/ws/tokens", body)
    if answer.status == 403:
        raise NoToken(answer.json.get("message", "no token is issued"))
    return str(_accepted(answer)["token"])


async def _event(backend: ApiClient, connection: Connection) -> float:
    mark = secrets.token_hex(8)
    begun = trio.current_time()
    body = {"event": EVENT, "data": mark, "user_ids": [OPERATOR]}
    _accepted(await _ask(backend, "POST", f"{ROOM}/events", body))
    return await _arrival(connection, "data", mark) - begun


async def _message(backend: ApiClient, connection: Connection) -> float:
    """A stored one, deleted at the end: its place in the room stays, without its text."""
    mark = secrets.token_hex(8)
    begun = trio.current_time()
    body = {"conversation_id": OPERATOR, "sender_id": OPERATOR, "content": "chatd doctor", "client_id": mark}
    posted = _accepted(await _ask(backend, "POST", MESSAGES, body))
    try:
        return await _arrival(connection, "client_id", mark) - begun
    finally:
        with trio.CancelScope(shield=True):  # bounded by the backend's own deadline
            await _ask(backend, "DELETE", f"{MESSAGES}/{posted['id']}")


async def _arrival(connection: Connection, key: str, mark: str) -> float:
    """When the event with this mark came."""
    with trio.move_on_after(PATIENCE):
        while (await connection.next()).get(key) != mark:
            pass
        return trio.current_time()
    raise Disconnected(f"what was posted did not arrive in {PATIENCE:.0f} s")


async def _ask(backend: ApiClient, *request: Any) -> Answer:
    return await trio.to_thread.run_sync(partial(backend.ask, *request), abandon_on_cancel=True)


def _accepted(answer: Answer) -> dict[str, Any]:
    if answer.status == 401:
        raise OperatorError("api.internal_token here is not the daemon's")
    if answer.status != 200:
        raise OperatorError(f"the post is refused: {answer.json.get('message', answer.status)}")
    return answer.json
