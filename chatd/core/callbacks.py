"""What a backend is told or asked: the body, and the headers with the signature that shows it is ours. Pure."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Any

import msgspec

from chatd.core.model import now


def body(event: str, data: Any) -> bytes:
    return msgspec.json.encode({"event": event, "at": now(), "data": data})


def headers(secret: str, event: str, content: bytes, **more: str) -> dict[str, str]:
    """`X-Chatd-Signature: t=<unix seconds>,v1=<HMAC-SHA256 of "<t>." and the body, in hex>`."""
    moment = int(time.time())
    signature = hmac.digest(secret.encode(), b"%d." % moment + content, hashlib.sha256).hex()
    return {
        "Content-Type": "application/json",
        "X-Chatd-Event": event,
        "X-Chatd-Signature": f"t={moment},v1={signature}",
    } | more
