"""Who may use the API: a backend, which knows the internal token; never a browser's script."""

from __future__ import annotations

import hmac

from chatd.config import Api
from chatd.errors import Forbidden, Unauthorized


def check_access(api: Api, token: bytes, *, origin: bool) -> None:
    """`origin`: the request has an Origin header. Raises Forbidden, Unauthorized."""
    if origin:  # a browser's script: whoever posts for all users is none
        raise Forbidden("this API is for backends, not for browsers")
    # All are compared, whichever fits: the time tells nothing.
    fits = [
        hmac.compare_digest(token, one.encode()) for one in (api.internal_token, api.previous_internal_token)
    ]
    if not (fits[0] or (fits[1] and api.previous_internal_token)):
        raise Unauthorized()
