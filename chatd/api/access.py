"""Access to the API: a backend that sends the internal token may use it, and a browser's script never may."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from chatd.config import Api, is_loopback_name
from chatd.core.errors import Encoded, Forbidden, Unauthorized


def check_host(host: str) -> None:
    """Protect the demo, whose token is public and whose page logs anybody in, against DNS rebinding: a page of
    another site, whose name resolves to this machine, has that name in its Host header. Raises Forbidden.
    """
    if not is_loopback_name(host):
        raise Forbidden("the demo answers only requests whose Host is localhost or 127.0.0.1")


def check_access(api: Api, tokens: Sequence[bytes], *, origin: bool) -> None:
    """Check a request's token. `tokens`: the values of all `X-Internal-Token` headers; `origin`: whether the
    request has an `Origin` header. Raises Forbidden, Unauthorized.
    """
    if origin:  # a browser's script has sent the request; such a script must not hold a token for all users
        raise Forbidden("this API is for backends, not for browsers")
    if not is_token(api, tokens):
        raise Unauthorized()


def check_encoding(encoding: str) -> None:
    """Check the Content-Encoding of a body: chatd decodes none. Raises Encoded."""
    if encoding.strip().lower() not in ("", "identity"):
        raise Encoded(f"chatd does not decode Content-Encoding {encoding[:50]}: send the body as it is.")


def is_token(api: Api, tokens: Sequence[bytes]) -> bool:
    """Whether these header values are one valid internal token."""
    # Refuse several headers: a proxy may have checked another of them.
    token = tokens[0] if len(tokens) == 1 else b""
    # Compare with all tokens, even after a match, so that the time does not reveal which one matches.
    fits = [
        hmac.compare_digest(token, one.encode()) for one in (api.internal_token, api.previous_internal_token)
    ]
    return fits[0] or (fits[1] and bool(api.previous_internal_token))
