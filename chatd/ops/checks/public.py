"""The public URL: what clients come through, and what must not be reachable there."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import trio

from chatd.core.errors import OperatorError
from chatd.ops.api import ask, reason
from chatd.ops.checks.serving import tried
from chatd.ops.client import Disconnected, NotUpgraded, connect
from chatd.ops.finding import Case, Finding, ok, problem, warning

CONNECT = 5.0  # seconds
FEW_DAYS, LAST_DAYS = 21, 7  # renewals begin 30 days before the end
DAY = 86400
CERTIFICATE, UPGRADE, INTERNAL = "certificate", "upgrade", "internal API"
PASS_ON = (
    "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;"
    " proxy_set_header Connection $chatd_connection;"
)
SHIPPED = "docs/nginx-websocket.conf has it all."

# Each is the API's if it answers like this: the status, and what its body begins with.
PRIVATE = {
    "/api/ws/users/1": b'{"message":"Unauthorized"',
    "/metrics": b"# HELP",
    "/openapi.json": b'{"',
    "/readyz": b'{"status"',
}


def certificate(case: Case) -> Finding | None:
    """Whether clients will believe it, and for how long."""
    if not case.url:
        return None
    parts = urlsplit(case.url)
    if parts.scheme != "wss":
        return problem(
            CERTIFICATE, f"{case.url} is without TLS: tokens can be read on the way", f"Use wss://. {SHIPPED}"
        )
    host = parts.hostname or ""
    try:
        with (
            socket.create_connection((host, parts.port or 443), timeout=CONNECT) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) as secure,
        ):
            ends = str((secure.getpeercert() or {}).get("notAfter", ""))
    except ssl.SSLCertVerificationError as error:
        return problem(
            CERTIFICATE,
            f"is not valid: {error.verify_message}",
            "Renew it (certbot renew), with its whole chain.",
        )
    except OSError as error:
        return problem(
            CERTIFICATE, f"no TLS with {host}: {reason(error)}", "See the proxy, and the name's address."
        )
    days = int((ssl.cert_time_to_seconds(ends) - time.time()) // DAY)
    text = f"of {host} is valid for {days} more days"
    if days < LAST_DAYS:
        return problem(
            CERTIFICATE, text, "Renew it now: certbot renew, and see why that is not done by itself."
        )
    if days < FEW_DAYS:
        return warning(
            CERTIFICATE, text, "See why it is not renewed: systemctl list-timers, certbot renew --dry-run."
        )
    return ok(CERTIFICATE, text)


async def upgrade(case: Case) -> Finding | None:
    """Whether the proxy passes a browser's handshake on as it must."""
    if not case.url:
        return None
    try:
        async with connect(case.url, origin=_base(case.url)) as connection:
            hello = await connection.next()
    except NotUpgraded as refusal:
        return await _not_upgraded(case, refusal)
    except Disconnected as error:
        return problem(
            UPGRADE, f"{case.url}: {error}", "See that the proxy runs, and that its name leads here."
        )
    if hello["event"] != "hello":
        return problem(UPGRADE, f"{case.url} is no chatd", f"See the proxy's location for it. {SHIPPED}")
    return ok(UPGRADE, f"{case.url} passes a browser's WebSocket on")


async def _not_upgraded(case: Case, refusal: NotUpgraded) -> Finding:
    status, ours = refusal.status, "server" not in refusal.headers or not refusal.body
    if status == 403 and refusal.body == b"foreign_origin":
        return _foreign(case)
    if status == 400 and ours:
        return await trio.to_thread.run_sync(partial(_missing_header, case.url), abandon_on_cancel=True)
    advice = {
        404: "The proxy has no location for it: location = /ws { proxy_pass http://127.0.0.1:6001; … }",
        502: "The proxy does not reach chatd: see its proxy_pass, and hub.bind.",
        503: "chatd, or the proxy, has as many connections as it may: see limits, limit_conn, limit_req.",
        504: "chatd does not answer the proxy: see its log.",
    }.get(status, "The proxy serves something else there: see its location for /ws.")
    return problem(UPGRADE, f"{case.url} answers with {refusal}", f"{advice} {SHIPPED}")


def _foreign(case: Case) -> Finding:
    base = _base(case.url)
    if case.config.hub.origins:
        return problem(
            UPGRADE,
            f"a page of {base} may not connect: hub.origins names others",
            f'Add "{base}" to hub.origins, if pages of that name are to chat.',
        )
    return problem(
        UPGRADE,
        "the header Host is missing: chatd compares a page's Origin with the proxy's own name for it",
        f"Add to its location: proxy_set_header Host $host; {SHIPPED}",
    )


def _missing_header(url: str) -> Finding:
    """chatd answers 400 to what is no handshake. It looks at `Connection`, then at the version, then at
    `Upgrade`: one with a version that it does not know tells how far it came.
    """
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "12",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    answer = ask(_base(url), "GET", urlsplit(url).path or "/", headers, within=CONNECT)
    missing = "Upgrade" if answer.status == 426 else "Connection: upgrade"
    return problem(
        UPGRADE, f"the proxy does not pass the header {missing} on", f"Add to its location: {PASS_ON} {SHIPPED}"
    )


def internal_api(case: Case) -> Iterator[Finding]:
    """Whether the outside gets an answer that only api.bind should give. The token is not sent."""
    if not case.url:
        return
    base = _base(case.url)
    try:
        answers = {path: ask(base, "GET", path, {}, within=CONNECT).body for path in PRIVATE}
    except OperatorError as error:
        yield warning(INTERNAL, f"could not be looked for: {str(error).rstrip('.')}", "See the findings above.")
        return
    reached = [path for path, begins in PRIVATE.items() if answers[path].startswith(begins)]
    if reached:
        yield problem(
            INTERNAL,
            f"can be reached from outside: {', '.join(base + path for path in reached)}",
            f"Let the proxy pass on /ws alone: location / {{ return 404; }} {SHIPPED}",
        )
    else:
        yield ok(INTERNAL, f"cannot be reached through {base}")


async def public_round_trip(case: Case) -> Finding | None:
    """From a post to a WebSocket through the proxy."""
    if not (case.url and case.running):
        return None
    return await tried(case, case.url, "public round trip")


def _base(url: str) -> str:
    """`wss://host/ws` → `https://host`: the origin of its pages."""
    parts = urlsplit(url)
    return f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc.rpartition('@')[2]}"
