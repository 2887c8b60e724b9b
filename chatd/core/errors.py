"""What can go wrong, once: an error's code is the same string over WebSocket and HTTP.

    ChatError
    ├── BadRequest        bad_request      422   `field` says which
    │   └── NotJSON       bad_request      400
    ├── Unauthorized      unauthorized     401   closes a socket for good; `way` says why
    │   └── Revoked       unauthorized     401   … because somebody has decided so
    ├── TokenExpired      token_expired    401   closes a socket with 4001: another token is wanted
    │   └── Outdated      token_expired    401   … because of a revocation that it may be older than
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
    │   └── UnusableVerdict   internal     500   … and it would be so again: not retryable
    └── Unavailable       unavailable      503   `retry_after`
        ├── NotYet        unavailable      503   a token that counts in a moment
        └── CallFailed    unavailable      503   the backend's or a key server's; the log has the reason

Beside it the codes of a WebSocket's end, `Close` for clients that come back and `Final` for those that stop,
and `OperatorError`, which ends the program with a sentence.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, ClassVar


class Close(IntEnum):
    """Why the server ends a connection whose client may come back: 4500–4999 are in `Final`."""

    TOO_BIG = 1009
    SERVER_ERROR = 1011
    RESTART = 1012
    OVERLOADED = 1013
    NO_PONG = 4000
    TOKEN_EXPIRED = 4001
    TOO_SLOW = 4002
    ASKED_TO_RECONNECT = 4003
    NO_AUTH = 4004
    AUTH_UNAVAILABLE = 4005
    TOO_MANY_REQUESTS = 4006


_NOT_VALID = "this token is not valid"


class Final(Enum):
    """Every way into a code from 4500, where clients stop.

    A final word must be true for good. Whatever time alone cures, or the next token that the client fetches by
    itself, gets a `Close`. docs/errors.md has a row for each of these, which says why it is final.
    """

    TOKEN_MALFORMED = "token_malformed", 4500, _NOT_VALID
    TOKEN_TOO_LONG = "token_too_long", 4500, _NOT_VALID
    TOKEN_ALGORITHM = "token_algorithm", 4500, _NOT_VALID
    TOKEN_KEY = "token_key", 4500, _NOT_VALID
    TOKEN_SIGNATURE = "token_signature", 4500, _NOT_VALID
    TOKEN_CLAIM = "token_claim", 4500, _NOT_VALID
    TOKEN_NOT_YET = "token_not_yet", 4500, _NOT_VALID
    TOKEN_USER = "token_user", 4500, _NOT_VALID
    TOKEN_ROOMS = "token_rooms", 4500, _NOT_VALID
    TOKEN_REFUSED = "token_refused", 4500, _NOT_VALID
    TOKEN_IN_URL = "token_in_url", 4500, "tokens in the URL are not accepted here"
    BINARY_FRAME = "binary_frame", 4501, "frames are text"
    NO_JSON = "no_json", 4501, "a frame holds one JSON object"
    NO_CONVERSATION = "no_conversation", 4501, "conversation_id is no id"
    REVOKED = "revoked", 4503, "this login was revoked"
    BANNED = "banned", 4503, "this user is banned"
    DISCONNECTED = "disconnected", 4503, "disconnected by the backend"
    NOT_LET_IN = "not_let_in", 4503, "there is no such conversation, or it is not yours to see"
    TAKEN_OUT = "taken_out", 4503, "this subscription was ended"
    TOO_MANY_CONNECTIONS = "too_many_connections", 4504, "too many connections of this user"
    OTHER_PROTOCOL = "other_protocol", 4506, "this server speaks chatd.v1"

    @property
    def label(self) -> str:
        """For the log and the documentation."""
        return self.value[0]

    @property
    def code(self) -> int:
        return self.value[1]

    @property
    def sentence(self) -> str:
        """For the client."""
        return self.value[2]


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
    """`way` ends a WebSocket for good; without one, and over HTTP, this request alone is refused.

    `why` is for the operator's log alone: what is wrong with a token is no help to somebody who guesses.
    """

    code, status, sentence = "unauthorized", 401, "Unauthorized"

    def __init__(self, way: Final | None = None, why: str = "", *, message: str = "", **details: Any) -> None:
        super().__init__(message or (way.sentence if way else ""), **details)
        self.way, self.why = way, why


class Revoked(Unauthorized):
    """Somebody has decided it."""


class TokenExpired(ChatError):
    """The next token that the client fetches may be right."""

    code, status, sentence = "token_expired", 401, "the token has expired: get a new one"
    why = "expired"


class Outdated(TokenExpired):
    """It may be older than the revocation at `valid_after`, and nobody can tell. A new one will not be."""

    sentence = "tokens were revoked about when this one was issued: get a new one"
    why = "it may be older than a revocation"

    def __init__(self, valid_after: int) -> None:
        super().__init__()
        self.valid_after = valid_after


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


class UnusableVerdict(Internal):
    """The backend's hook has answered what cannot be used, and would again: somebody has to change the hook."""

    retryable = False
    sentence = "the verdict on this message cannot be used; the log has it under this incident"


class Unavailable(ChatError):
    """The outcome of a write that ends with this is unknown: retry it with the same `client_id`."""

    code, status, retryable, sentence = "unavailable", 503, True, "the database does not answer"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class NotYet(Unavailable):
    """The same token counts in a moment. `why` is for the operator's log."""

    sentence = "this login does not count yet: try again in a moment"

    def __init__(self, why: str, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)
        self.why = why


class CallFailed(Unavailable):
    """A call to the backend, or to a key server, came to nothing.

    Clients are told that alone. `kind` (timeout, unreachable, wrong_answer) is for the metrics; `reason`, which
    may name hosts, is for the log.
    """

    sentence = "the backend does not answer"

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__()
        self.kind, self.reason = kind, reason


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


def innermost(error: BaseException) -> BaseException:
    """The first error that is in no group, of those that a nursery has put into one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
