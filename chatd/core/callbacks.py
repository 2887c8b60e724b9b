"""The body and the signed headers of a request from chatd to a backend. No I/O.

chatd signs each request twice: as Standard Webhooks 1.0 specifies (https://www.standardwebhooks.com), because
libraries verify that, and in chatd's own older format, because existing backends verify that.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import b64decode, b64encode
from typing import Any

import msgspec

from chatd.core.model import now

PREFIX = "whsec_"  # starts a secret that is written in the format of Standard Webhooks
KEY_BYTES = 24  # the least length of a key, by Standard Webhooks
DIGEST_BYTES = 8


def body(event: str, data: Any) -> bytes:
    return msgspec.json.encode({"event": event, "at": now(), "data": data})


def key_of(secret: str) -> bytes:
    """The HMAC key for Standard Webhooks: the base64 after `whsec_`, decoded; a secret without that prefix as
    it is.

    Raises ValueError if the text after the prefix is not base64.
    """
    if not secret.startswith(PREFIX):
        return secret.encode()
    text = secret.removeprefix(PREFIX).rstrip("=")
    return b64decode(text + "=" * (-len(text) % 4), validate=True)


def id_of(delivery: int, content: bytes) -> str:
    """The `webhook-id` of an event: the same at every attempt, so a backend can use it as an idempotency key.

    The number alone is not enough: a database that was restored from a backup uses its numbers again. The body
    holds the time of the event, so its digest tells the two events apart.
    """
    return f"{delivery}-{hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()}"


def headers(secret: str, event: str, id: str, content: bytes, **more: str) -> dict[str, str]:
    """The headers of one attempt, with two signatures. `t` is the present time in unix seconds.

    Standard Webhooks: `webhook-signature: v1,<base64 of HMAC-SHA256("<id>.<t>." + body)>`.
    chatd's own: `X-Chatd-Signature: t=<t>,v1=<hex of HMAC-SHA256("<t>." + body)>`.
    """
    moment = int(time.time())
    standard = hmac.digest(key_of(secret), f"{id}.{moment}.".encode() + content, hashlib.sha256)
    own = hmac.digest(secret.encode(), b"%d." % moment + content, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(moment),
        "webhook-signature": f"v1,{b64encode(standard).decode()}",
        "X-Chatd-Event": event,
        "X-Chatd-Signature": f"t={moment},v1={own.hex()}",
    } | more
