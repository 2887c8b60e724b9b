"""Every error answer has the same shape, which Laravel clients expect: `{"message", "code", "errors"?}`."""

from __future__ import annotations

import math
import secrets
from typing import Any

import structlog
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from chatd.api.schemas import answer
from chatd.core.errors import BadRequest, ChatError, Internal

_CODES = {404: "not_found", 413: "too_large", 408: "bad_request"}
_SENTENCES = {
    413: "The body is too large.",
    404: "This path does not exist.",
    405: "This method is not allowed here.",
}

log = structlog.get_logger()


def install(app: Quart) -> None:
    app.register_error_handler(ChatError, _refused)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unforeseen)


def body_of(error: ChatError) -> dict[str, Any]:
    body: dict[str, Any] = {"message": str(error), "code": error.code} | error.details
    errors = (
        error.errors if isinstance(error, BadRequest) else {error.field: [str(error)]} if error.field else {}
    )
    return body | {"errors": errors} if errors else body


async def _refused(error: ChatError) -> Response:
    response = answer(body_of(error), error.status)
    if "retry_after" in error.details:
        response.headers["Retry-After"] = str(math.ceil(error.details["retry_after"]))
    return response


async def _http(error: HTTPException) -> Response:
    status = error.code or 500
    sentence = _SENTENCES.get(status, error.description or "The request was refused.")
    response = answer({"message": sentence, "code": _CODES.get(status, "bad_request")}, status)
    for name, value in error.get_headers():
        if name.lower() == "allow":
            response.headers["Allow"] = value
    return response


async def _unforeseen(error: Exception) -> Response:
    return await _refused(unforeseen(error, request.method, request.path))


def unforeseen(error: Exception, method: str, path: str) -> Internal:
    """Log an unexpected error, and return the answer for the client, which has the log line's incident id."""
    incident = secrets.token_hex(6)
    log.error("request_failed", incident=incident, method=method, path=path, exc_info=error)
    return Internal(incident=incident)
