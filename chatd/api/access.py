"""Who may use the API: a backend, which knows the internal token; never a browser's script."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from chatd.config import Api, is_loopback_name
from chatd.core.errors import Forbidden, Unauthorized


def check_host(host: str) -> None:
    """For the demo, whose token is known and whose page gives a login to anybody: a page of another site, whose
    name was made to lead to this machine, names itself in Host. Raises Forbidden."""
    if not is_loopback_name(host):
        raise Forbidden("the demo answers to localhost and 127.0.0.1 alone, not to the name in Host")


def check_access(api: Api, tokens: Sequence[bytes], *, origin: bool) -> None:
    """`tokens`: all headers of that name; `origin`: there is an Origin. Raises Forbidden, Unauthorized."""
    if origin:  # a browser's script: whoever posts for all users is none
        raise Forbidden("this API is for backends, not for browsers")
    if not is_token(api, tokens):
        raise Unauthorized()


def is_token(api: Api, tokens: Sequence[bytes]) -> bool:
    """Whether these headers show that it is a backend."""
    # With several a proxy may have judged another one than we would.
    token = tokens[0] if len(tokens) == 1 else b""
    # All are compared, whichever fits: the time tells nothing.
    fits = [
        hmac.compare_digest(token, one.encode()) for one in (api.internal_token, api.previous_internal_token)
    ]
    return fits[0] or (fits[1] and bool(api.previous_internal_token))
