"""Reads an upgrade request, also one that spreads a header over several lines.

Several lines of one header form one list, in their order (RFC 9110 §5.3), for example when a proxy adds a line.
wsproto alone would take only the last line of some headers. If a header that must be single comes twice, the
joined value matches nothing: two Origins are not allowed, and two tokens are not valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

import h11
from trio_websocket import WebSocketRequest
from wsproto.events import Request
from wsproto.handshake import H11Handshake

from chatd.core.protocol import SUBPROTOCOL
from chatd.hub.admission.registry import Handshake, Refused

Headers = dict[bytes, bytes]


class Joining(H11Handshake):
    """wsproto's handshake, which is given each header once."""

    def _process_connection_request(self, event: h11.Request) -> Request:
        headers = joined(event.headers)
        if b"websocket" in _listed(headers.get(b"upgrade", b"").lower()):  # RFC 6455 §4.2.1: among others
            headers[b"upgrade"] = b"websocket"
        once = h11.Request(
            method=event.method,
            target=event.target,
            headers=list(headers.items()),
            http_version=event.http_version,
        )
        return super()._process_connection_request(once)


def joined(lines: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Join the lines of each header with commas. The keys are the names in lower case."""
    headers: Headers = {}
    for name, value in lines:
        before = headers.get(name.lower())
        headers[name.lower()] = value if before is None else before + b", " + value
    return headers


def _listed(value: bytes) -> list[bytes]:
    return [item.strip() for item in value.split(b",")]


def read(request: WebSocketRequest) -> Handshake:
    """Parse the request. Raises Refused."""
    headers = {name: value.decode("latin-1") for name, value in joined(request.headers).items()}
    try:
        parts = urlsplit(request.path)
    except ValueError:
        raise Refused(404, "not_found") from None
    scheme, _, credentials = headers.get(b"authorization", "").partition(" ")
    return Handshake(
        path=parts.path,
        query={key: values[-1] for key, values in parse_qs(parts.query).items()},
        host=request._event.host,  # the pinned version has no public name for it
        origin=headers.get(b"origin"),
        bearer=credentials.strip() if scheme.lower() == "bearer" else None,
        forwarded_for=headers.get(b"x-forwarded-for", ""),
        subprotocols=tuple(name for name in request.proposed_subprotocols if name),
    )


def chosen(handshake: Handshake) -> str | None:
    """Choose the subprotocol: `chatd.v1` if the client offers it, else the first that it offers, because a
    browser drops a connection for which the server chose none.
    """
    if SUBPROTOCOL in handshake.subprotocols:
        return SUBPROTOCOL
    return handshake.subprotocols[0] if handshake.subprotocols else None
