"""The headers of a call to the backend, with the signature that shows it is ours. Pure."""

from __future__ import annotations

import hashlib
import hmac
import time


def headers(secret: str, event: str, content: bytes, **more: str) -> dict[str, str]:
    """`X-Chatd-Signature: t=<unix seconds>,v1=<HMAC-SHA256 of "<t>." and the body, in hex>`."""
    moment = int(time.time())
    signature = hmac.digest(secret.encode(), b"%d." % moment + content, hashlib.sha256).hex()
    return {
        "Content-Type": "application/json",
        "X-Chatd-Event": event,
        "X-Chatd-Signature": f"t={moment},v1={signature}",
    } | more
