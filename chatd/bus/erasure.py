"""Removes one user's messages from the stream that other services read, for `chatd user erase`."""

from __future__ import annotations

from typing import Any

import msgspec

from chatd.bus.client import LOST, STREAM, client_of
from chatd.config import Redis
from chatd.core.errors import OperatorError

CHUNK = 1000  # entries


def erase(config: Redis, user_id: int) -> int:
    """Delete the user's entries in chat.stream; returns their number. Raises OperatorError."""
    client = client_of(config)
    try:
        count, start = 0, "-"
        while True:
            entries: Any = client.xrange(STREAM, min=start, max="+", count=CHUNK)
            ids = [id for id, fields in entries if _is_by(fields.get(b"m", b""), user_id)]
            if ids:
                count += int(client.xdel(STREAM, *ids))
            if len(entries) < CHUNK:
                return count
            start = f"({entries[-1][0].decode()}"
    except LOST as error:
        raise OperatorError(
            f"Redis does not answer ({error}): {STREAM} still has the user's messages."
        ) from error
    finally:
        client.close()


def _is_by(payload: bytes, user_id: int) -> bool:
    try:
        found = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return False
    return isinstance(found, dict) and found.get("user_id") == user_id
