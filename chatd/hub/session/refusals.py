"""Refused logins: with which close code the connection ends, and what is logged.

A client with an invalid token learns only that it is invalid. The log has the reason, each at a limited rate
for all clients together.
"""

from __future__ import annotations

from typing import Any

from chatd.core.errors import (
    ChatError,
    Close,
    Final,
    RateLimited,
    Revoked,
    TokenExpired,
    TooManyConnections,
    Unauthorized,
    Unavailable,
)
from chatd.observe import metrics
from chatd.observe.logs import Recurring

LOGIN_ERRORS = (Unauthorized, TokenExpired, Unavailable, RateLimited, TooManyConnections)

_logged: dict[str, Recurring] = {}  # by reason: there are about twenty


def close_for(error: ChatError) -> Close | Final:
    """Return the close code for a connection whose login ended with this error."""
    match error:
        case Unauthorized(way=Final() as way):
            return way
        case TokenExpired():
            return Close.TOKEN_EXPIRED
        case RateLimited():
            return Close.TOO_MANY_REQUESTS
        case TooManyConnections():
            return Final.TOO_MANY_CONNECTIONS
        case _:
            return Close.AUTH_UNAVAILABLE


def refused(error: ChatError, **about: Any) -> None:
    """Count and log a refused login. `about`: fields of the log line that identify the client."""
    way = getattr(error, "way", None)
    label = way.label if way else error.code
    if isinstance(error, Unauthorized | TokenExpired):
        metrics.AUTH_FAILURES.labels("revoked" if isinstance(error, Revoked) else error.code).inc()
    why = getattr(error, "why", "") or str(error)
    _logged.setdefault(label, Recurring("login_refused")).info(code=error.code, reason=label, why=why, **about)
