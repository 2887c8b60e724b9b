"""A login that is refused: how its connection ends, and what the operator's log says of it.

Who brings a wrong token is told that it is wrong; what is wrong with it is in the log alone, each reason now
and then, however many clients meet it.
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

_told: dict[str, Recurring] = {}  # by reason: there are some twenty


def goodbye_for(error: ChatError) -> Close | Final:
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
    """`about`: whose login it was."""
    way = getattr(error, "way", None)
    label = way.label if way else error.code
    if isinstance(error, Unauthorized | TokenExpired):
        metrics.AUTH_FAILURES.labels("revoked" if isinstance(error, Revoked) else error.code).inc()
    why = getattr(error, "why", "") or str(error)
    _told.setdefault(label, Recurring("login_refused")).info(code=error.code, reason=label, why=why, **about)
