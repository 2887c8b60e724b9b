"""What a backend is told or asked: the body, and the headers whose signatures show that it is ours. Pure.

It is signed twice: as Standard Webhooks 1.0 has it (https://www.standardwebhooks.com), for which there are
libraries, and as chatd did before it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from typing import Any

import msgspec

from chatd.core.model import now

PREFIX = "whsec_"  # of a secret that is written as Standard Webhooks has it
KEY_BYTES = 24  # that such a secret has at least
DIGEST_BYTES = 8


def body(event: str, data: Any) -> bytes:
    return msgspec.json.encode({"event": event, "at": now(), "data": data})


def key_of(secret: str) -> bytes:
    """What signs for Standard Webhooks: behind `whsec_` it is base64, and any other secret is the key as it is.

    Raises ValueError.
    """
    if not secret.startswith(PREFIX):
        return secret.encode()
    text = secret.removeprefix(PREFIX).rstrip("=")
    return b64decode(text + "=" * (-len(text) % 4), validate=True)


def id_of(delivery: int, content: bytes) -> str:
    """The same each time an event is tried. A database that goes back in time gives its numbers again, but the
    moment in the body is another."""
    return f"{delivery}-{hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()}"


def headers(secret: str, event: str, id: str, content: bytes, **more: str) -> dict[str, str]:
    """Of Standard Webhooks, `webhook-signature: v1,<HMAC-SHA256 of "<id>.<t>." and the body, in base64>`; and
    `X-Chatd-Signature: t=<t>,v1=<HMAC-SHA256 of "<t>." and the body, in hex>`. `t` is unix seconds.
    """
    moment = int(time.time())
    standard = hmac.digest(key_of(secret), f"{id}.{moment}.".encode() + content, hashlib.sha256)
    own = hmac.digest(secret.encode(), b"%d." % moment + content, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(moment),
        "webhook-signature": f"v1,{b64encode(standard).decode()}",
        "X-Chatd-Event": event,
        "X-Chatd-Signature": f"t={moment},v1={own.hex()}",
    } | more
