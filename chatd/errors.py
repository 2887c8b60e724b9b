"""What can go wrong, once: an error's code is the same string over WebSocket and HTTP.

    ChatError
    ├── BadRequest        bad_request      422   `field` says which
    │   └── NotJSON       bad_request      400
    ├── Unauthorized      unauthorized     401   closes a socket with 4500
    │   ├── TokenExpired  token_expired    401   … 4001
    │   └── Revoked       unauthorized     401   … 4503
    ├── Forbidden         forbidden        403
    │   └── Muted         muted            403   `until`
    ├── NotFound          not_found        404   missing, or not yours to see: the two look alike
    ├── Conflict          conflict         409
    ├── LimitExceeded     limit_exceeded   409
    ├── TooLarge          too_large        413   `field` says which, if it was one
    ├── RateLimited       rate_limited     429   `retry_after`
    ├── UnknownEvent      unknown_event    –
    ├── Superseded        superseded       –     another node reads chat.ingest now; nobody outside sees it
    ├── Internal          internal         500   `incident` finds it in the log
    └── Unavailable       unavailable      503   `retry_after`

Beside it `Close`, the codes of a WebSocket's end, and `OperatorError`, which ends the program with a sentence.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class Close(IntEnum):
    """Why the server ends a connection. The client's rule: 4500–4999 stop, everything else reconnects."""

    TOO_BIG = 1009
    SERVER_ERROR = 1011
    RESTART = 1012
    OVERLOADED = 1013
    NO_PONG = 4000
    TOKEN_EXPIRED = 4001
    TOO_SLOW = 4002
    ASKED_TO_RECONNECT = 4003
    AUTH_UNAVAILABLE = 4005
    TOO_MANY_REQUESTS = 4006
    INVALID_TOKEN = 4500
    PROTOCOL_ERROR = 4501
    NO_AUTH = 4502
    REVOKED = 4503
    TOO_MANY_CONNECTIONS = 4504
    UNSUPPORTED_VERSION = 4506


class ChatError(Exception):
    """A request that is not granted. `str(error)` is the sentence for the one who asked."""

    code: ClassVar[str]
    status: ClassVar[int]
    retryable: ClassVar[bool] = False
    sentence: ClassVar[str] = ""

    def __init__(self, message: str = "", *, field: str | None = None, **details: Any) -> None:
        super().__init__(message or self.sentence)
        self.field = field
        self.details = details

    def body(self) -> dict[str, Any]:
        """The keys that both protocols show; `details` are `retry_after`, `until` and `incident`."""
        shown: dict[str, Any] = {"code": self.code, "message": str(self), "retryable": self.retryable}
        if self.field is not None:
            shown["field"] = self.field
        return shown | self.details


class BadRequest(ChatError):
    code, status = "bad_request", 422

    def __init__(
        self, message: str, *, field: str | None = None, errors: dict[str, list[str]] | None = None
    ) -> None:
        super().__init__(message, field=field)
        self.errors = errors or ({field: [message]} if field else {})


class NotJSON(BadRequest):
    status = 400


class Unauthorized(ChatError):
    code, status, sentence = "unauthorized", 401, "Unauthorized"
    close: ClassVar[Close] = Close.INVALID_TOKEN


class TokenExpired(Unauthorized):
    code, sentence = "token_expired", "the token has expired: get a new one"
    close = Close.TOKEN_EXPIRED


class Revoked(Unauthorized):
    sentence = "this login was revoked"
    close = Close.REVOKED


class Forbidden(ChatError):
    code, status, sentence = "forbidden", 403, "you may not do this"


class Muted(Forbidden):
    code, sentence = "muted", "you may read but not write here for now"


class NotFound(ChatError):
    code, status, sentence = "not_found", 404, "there is no such thing, or it is not yours to see"


class Conflict(ChatError):
    code, status = "conflict", 409
    sentence = "this client_id was used before, with other content"


class LimitExceeded(ChatError):
    code, status = "limit_exceeded", 409


class TooManyConnections(LimitExceeded):
    sentence = "too many connections of this user"


class TooLarge(ChatError):
    code, status = "too_large", 413


class RateLimited(ChatError):
    code, status, retryable, sentence = "rate_limited", 429, True, "too many requests"


class UnknownEvent(ChatError):
    code, status = "unknown_event", 422


class Superseded(ChatError):
    """The fencing token is not the newest: nothing was written."""

    code, status, sentence = "superseded", 503, "another node has taken over"


class Internal(ChatError):
    code, status, retryable = "internal", 500, True
    sentence = "something went wrong on our side; the log has it under this incident"


class Unavailable(ChatError):
    """The outcome of a write that ends with this is unknown: retry it with the same `client_id`."""

    code, status, retryable, sentence = "unavailable", 503, True, "the database does not answer"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class OperatorError(Exception):
    """The daemon cannot start or go on, and a person can change that: the message says how."""

    exit_code = 1


class DatabaseGone(OperatorError):
    """The file that is being served from is not the database any more."""


class ConfigError(OperatorError):
    """The configuration is wrong. `mistakes` has all of them, each with its key."""

    exit_code = 78  # EX_CONFIG of sysexits.h: a restart does not cure it

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes
