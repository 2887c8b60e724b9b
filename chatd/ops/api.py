"""A client of the running daemon's HTTP API. It imports only the standard library, so that `chatd send` and
`chatd healthcheck` start fast.
"""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from chatd.config import Config, split_bind
from chatd.core.errors import OperatorError

EVERYWHERE = ("", "0.0.0.0", "::")
WITHIN = 5.0  # seconds for connecting, and for each read of the answer
ANSWER_BYTES = 4 * 1024 * 1024  # bytes that are read of an answer, at most


class Unreachable(OperatorError):
    """The server does not answer. A retry may succeed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty if it is not one."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def reached_at(bind: str) -> str:
    """Return the `host:port` under which this machine reaches a `bind`: loopback for a bind to all
    addresses.
    """
    host, port = split_bind(bind)
    host = ("::1" if host == "::" else "127.0.0.1") if host in EVERYWHERE else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ApiClient:
    def __init__(self, config: Config, url: str = "", *, within: float = WITHIN) -> None:
        """`url` is the API's, if it is not the one of `api.bind`; `within` is in seconds."""
        self.url = url.rstrip("/") or f"http://{reached_at(config.api.bind)}"
        self._token, self._within = config.api.internal_token, within

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Send one request with the internal token. Raises Unreachable."""
        headers = {"X-Internal-Token": self._token, "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        return ask(self.url, method, path, headers, data, within=self._within)


def ask(
    url: str, method: str, path: str, headers: dict[str, str], data: bytes | None = None, *, within: float
) -> Answer:
    """Send one request, without a proxy and without following redirects. `within` is in seconds.

    Raises Unreachable, or OperatorError for an invalid URL.
    """
    try:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=within)
    except (ValueError, http.client.HTTPException) as error:
        raise OperatorError(f"{url}: this is not a valid URL; write http://host:port.") from error
    try:
        connection.request(method, parts.path + path, data, headers)
        response = connection.getresponse()
        return Answer(response.status, response.read(ANSWER_BYTES))
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise Unreachable(f"{url} does not answer: {reason(error)}.") from error
    finally:
        connection.close()


def reason(error: BaseException) -> str:
    """Return the text of a network error, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")
