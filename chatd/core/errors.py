"""Every error of chatd. An error has the same code over WebSocket and HTTP.

    ChatError
    ├── BadRequest        bad_request      422   `field` names the wrong field
    │   └── NotJSON       bad_request      400
    ├── Unauthorized      unauthorized     401   closes a socket with the final code of its `way`
    │   └── Revoked       unauthorized     401   … because an operator or the backend revoked the login
    ├── TokenExpired      token_expired    401   closes a socket with 4001: the client gets a new token
    │   └── Outdated      token_expired    401   … because the token may be older than a revocation
    ├── Forbidden         forbidden        403
    │   └── Muted         muted            403   `until`
    ├── NotFound          not_found        404   missing, or hidden from this user: a client cannot tell which
    ├── Conflict          conflict         409
    ├── LimitExceeded     limit_exceeded   409
    ├── TooLarge          too_large        413
    │   └── FieldTooLarge     too_large    422   `field` names the field
    ├── RateLimited       rate_limited     429   `retry_after`
    ├── UnknownEvent      unknown_event    –
    ├── Superseded        superseded       –     another node reads chat.ingest now; clients never see this
    ├── Internal          internal         500   the log has the cause under the same `incident`
    │   └── UnusableVerdict   internal     500   … which a retry would meet again: not retryable
    └── Unavailable       unavailable      503   `retry_after`
        ├── NotYet        unavailable      503   the token becomes valid in a moment
        └── CallFailed    unavailable      503   a call to the backend or a key server failed; the log says why

The module also has the close codes of a WebSocket: `Close` for clients that reconnect, `Final` for clients that
stop. `OperatorError` ends the program with a message for the operator.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, ClassVar


class Close(IntEnum):
    """Close codes after which the client reconnects. `Final` has those after which it stops (4500–4999)."""

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
    """Every reason for a close code from 4500 on, after which clients stop and do not reconnect.

    The reason must hold for good. If time alone or the next token that the client fetches removes the cause,
    the server uses a `Close` instead. docs/errors.md has a row for each reason, which says why it is final.
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
    BINARY_FRAME = "binary_frame", 4501, "send text frames, not binary frames"
    NO_JSON = "no_json", 4501, "each frame must hold one JSON object"
    NO_CONVERSATION = "no_conversation", 4501, "the conversation_id is not a valid id"
    REVOKED = "revoked", 4503, "this login was revoked"
    BANNED = "banned", 4503, "this user is banned"
    DISCONNECTED = "disconnected", 4503, "disconnected by the backend"
    NOT_LET_IN = "not_let_in", 4503, "there is no such conversation, or you may not see it"
    TAKEN_OUT = "taken_out", 4503, "the server ended this subscription"
    TOO_MANY_CONNECTIONS = "too_many_connections", 4504, "this user has too many connections"
    OTHER_PROTOCOL = "other_protocol", 4506, "this server supports only chatd.v1"

    @property
    def label(self) -> str:
        """Names the reason in the log and in the documentation."""
        return self.value[0]

    @property
    def code(self) -> int:
        return self.value[1]

    @property
    def sentence(self) -> str:
        """The reason in the close frame, for the client's developer."""
        return self.value[2]


class ChatError(Exception):
    """chatd refuses or fails a request. `str(error)` is the message for the client or backend that sent it."""

    code: ClassVar[str]
    status: ClassVar[int]
    retryable: ClassVar[bool] = False
    sentence: ClassVar[str] = ""

    def __init__(self, message: str = "", *, field: str | None = None, **details: Any) -> None:
        super().__init__(message or self.sentence)
        self.field = field
        self.details = details

    def body(self) -> dict[str, Any]:
        """The keys of the error in both protocols. `details` may hold `retry_after`, `until` and `incident`."""
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


class Encoded(BadRequest):
    """A body with a Content-Encoding. RFC 9110 §8.4 wants 415 from a server that does not decode it."""

    status = 415


class Unauthorized(ChatError):
    """chatd does not accept these credentials.

    With a `way`, chatd closes the WebSocket with that final code. Without one, and over HTTP, it refuses this
    request only. `why` says what is wrong with the token. It goes to the operator's log and never to the
    client, which could be guessing tokens.
    """

    code, status, sentence = "unauthorized", 401, "Unauthorized"

    def __init__(self, way: Final | None = None, why: str = "", *, message: str = "", **details: Any) -> None:
        super().__init__(message or (way.sentence if way else ""), **details)
        self.way, self.why = way, why


class Revoked(Unauthorized):
    """An operator or the backend has revoked this login."""


class TokenExpired(ChatError):
    """The token has expired. The next one that the client fetches may be valid."""

    code, status, sentence = "token_expired", 401, "the token has expired: get a new one"
    why = "expired"


class Outdated(TokenExpired):
    """The token may be older than the revocation at `valid_after` (unix seconds), and its times cannot show
    which.

    A new token will be younger, so this is not final.
    """

    sentence = "this token was issued at about the time when tokens were revoked: get a new one"
    why = "the token may be older than a revocation"

    def __init__(self, valid_after: int) -> None:
        super().__init__()
        self.valid_after = valid_after


class Forbidden(ChatError):
    code, status, sentence = "forbidden", 403, "you may not do this"


class Muted(Forbidden):
    code, sentence = "muted", "you are muted: you may read here, but not write for now"


class NotFound(ChatError):
    code, status, sentence = "not_found", 404, "it does not exist, or you may not see it"


class Conflict(ChatError):
    code, status = "conflict", 409
    sentence = "this client_id was already used for a message with other content"


class LimitExceeded(ChatError):
    code, status = "limit_exceeded", 409


class TooManyConnections(LimitExceeded):
    sentence = "this user has too many connections"


class TooLarge(ChatError):
    code, status = "too_large", 413


class FieldTooLarge(TooLarge):
    """The body as a whole is not: over HTTP it is a failed validation."""

    status = 422


class RateLimited(ChatError):
    code, status, retryable, sentence = "rate_limited", 429, True, "too many requests"


class UnknownEvent(ChatError):
    code, status = "unknown_event", 422


class Superseded(ChatError):
    """The database has a newer fencing token than this process: it wrote nothing."""

    code, status, sentence = "superseded", 503, "another node has taken over"


class Internal(ChatError):
    code, status, retryable = "internal", 500, True
    sentence = "internal error; the server's log has the cause under this incident number"


class UnusableVerdict(Internal):
    """The before_message hook of the backend gave an unusable answer. A retry would get the same: the hook is
    wrong.
    """

    retryable = False
    sentence = "the backend's verdict on this message is not valid; the log has it under this incident number"


class Unavailable(ChatError):
    """Something that chatd needs does not answer. `retry_after` is in seconds.

    A write that ends with this error may or may not have been stored: retry it with the same `client_id`.
    """

    code, status, retryable, sentence = "unavailable", 503, True, "the database does not answer"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class NotYet(Unavailable):
    """The same token becomes valid in a moment. `why` goes to the operator's log only."""

    sentence = "this token is not valid yet: try again in a moment"

    def __init__(self, why: str, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)
        self.why = why


class CallFailed(Unavailable):
    """A call to the backend or to a key server failed.

    Clients learn no more than that. `kind` (timeout, unreachable, wrong_answer) is a label of the metrics;
    `reason` and `advice`, which tells the operator what to do, go to the log only, because they may name
    internal hosts.
    """

    sentence = "the backend does not answer"

    def __init__(self, kind: str, reason: str, advice: str = "") -> None:
        super().__init__()
        self.kind, self.reason, self.advice = kind, reason, advice


class OperatorError(Exception):
    """The daemon cannot start or continue. The message says what the operator has to do."""

    exit_code = 1


class DatabaseAway(OperatorError):
    """No server of `database.url` can be used now. Trying again may help."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class DatabaseGone(OperatorError):
    """The open SQLite file was deleted, replaced or overwritten."""


class ConfigError(OperatorError):
    """The configuration is wrong. `mistakes` has one sentence for each mistake, which starts with its key."""

    exit_code = 78  # EX_CONFIG of sysexits.h: supervisors see that a restart does not help

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def innermost(error: BaseException) -> BaseException:
    """The first single error within nested exception groups, which is what Trio's nurseries raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
