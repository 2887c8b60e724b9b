"""Checks of the public URL, through the proxy: that clients can connect, and that the API is not reachable."""

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
FEW_DAYS, LAST_DAYS = 21, 7  # certbot renews 30 days before the end, so less than that means a failure
DAY = 86400
CERTIFICATE, UPGRADE, INTERNAL = "certificate", "upgrade", "internal API"
PASS_ON = (
    "proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;"
    " proxy_set_header Connection $chatd_connection;"
)
SHIPPED = "docs/nginx-websocket.conf is a complete example."

# Paths of the internal API, and how the bodies of their answers begin.
PRIVATE = {
    "/api/ws/users/1": b'{"message":"Unauthorized"',
    "/metrics": b"# HELP",
    "/openapi.json": b'{"',
    "/readyz": b'{"status"',
}


def certificate(case: Case) -> Finding | None:
    """Whether the certificate is valid, and for how long."""
    if not case.url:
        return None
    parts = urlsplit(case.url)
    if parts.scheme != "wss":
        return problem(
            CERTIFICATE, f"{case.url} has no TLS: others can read the tokens", f"Use wss://. {SHIPPED}"
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
            "Renew it (certbot renew), and serve it with its whole chain.",
        )
    except OSError as error:
        return problem(
            CERTIFICATE,
            f"no TLS connection to {host}: {reason(error)}",
            "Check the proxy, and the address of the name.",
        )
    days = int((ssl.cert_time_to_seconds(ends) - time.time()) // DAY)
    text = f"of {host} is valid for {days} more days"
    if days < LAST_DAYS:
        return problem(
            CERTIFICATE, text, "Renew it now (certbot renew), and find out why that does not happen by itself."
        )
    if days < FEW_DAYS:
        return warning(
            CERTIFICATE,
            text,
            "Find out why it is not renewed: systemctl list-timers, certbot renew --dry-run.",
        )
    return ok(CERTIFICATE, text)


async def upgrade(case: Case) -> Finding | None:
    """Whether the proxy passes a browser's handshake to chatd correctly."""
    if not case.url:
        return None
    try:
        async with connect(case.url, origin=_base(case.url)) as connection:
            hello = await connection.next()
    except NotUpgraded as refusal:
        return await _not_upgraded(case, refusal)
    except Disconnected as error:
        return problem(
            UPGRADE,
            f"{case.url}: {error}",
            "Check that the proxy runs, and that its name resolves to this machine.",
        )
    if hello["event"] != "hello":
        return problem(UPGRADE, f"{case.url} is not chatd", f"Check the proxy's location for it. {SHIPPED}")
    return ok(UPGRADE, f"a browser can open a WebSocket to {case.url}")


async def _not_upgraded(case: Case, refusal: NotUpgraded) -> Finding:
    status, ours = refusal.status, "server" not in refusal.headers or not refusal.body
    if status == 403 and refusal.body == b"foreign_origin":
        return _foreign(case)
    if status == 400 and ours:
        return await trio.to_thread.run_sync(partial(_missing_header, case.url), abandon_on_cancel=True)
    advice = {
        404: "The proxy has no location for it: location = /ws { proxy_pass http://127.0.0.1:6001; … }",
        502: "The proxy cannot reach chatd: check its proxy_pass, and hub.bind.",
        503: "chatd or the proxy has reached a limit: check limits, limit_conn, limit_req.",
        504: "chatd does not answer the proxy: check chatd's log.",
    }.get(status, "The proxy serves something else there: check its location for /ws.")
    return problem(UPGRADE, f"{case.url} answers with {refusal}", f"{advice} {SHIPPED}")


def _foreign(case: Case) -> Finding:
    base = _base(case.url)
    if case.config.hub.origins:
        return problem(
            UPGRADE,
            f"pages of {base} may not connect, because hub.origins does not list it",
            f'Add "{base}" to hub.origins, if these pages shall connect.',
        )
    return problem(
        UPGRADE,
        "the header Host is missing: chatd compares a page's Origin with the name that the proxy sends",
        f"Add to its location: proxy_set_header Host $host; {SHIPPED}",
    )


def _missing_header(url: str) -> Finding:
    """Find out which header the proxy drops. chatd answers an invalid handshake with 400. It checks the header
    `Connection` first, then the version, then `Upgrade`. So a handshake with an unknown version gets 426 if
    `Connection` has arrived.
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
    """Whether the public URL gives answers of the internal API. The requests do not have the token."""
    if not case.url:
        return
    base = _base(case.url)
    try:
        answers = {path: ask(base, "GET", path, {}, within=CONNECT).body for path in PRIVATE}
    except OperatorError as error:
        yield warning(INTERNAL, f"could not be checked: {str(error).rstrip('.')}", "See the findings above.")
        return
    reached = [path for path, begins in PRIVATE.items() if answers[path].startswith(begins)]
    if reached:
        yield problem(
            INTERNAL,
            f"can be reached from outside: {', '.join(base + path for path in reached)}",
            f"Configure the proxy so that it passes only /ws on: location / {{ return 404; }} {SHIPPED}",
        )
    else:
        yield ok(INTERNAL, f"cannot be reached through {base}")


async def public_round_trip(case: Case) -> Finding | None:
    """Measure the time from a post to its arrival on a WebSocket through the proxy."""
    if not (case.url and case.running):
        return None
    return await tried(case, case.url, "public round trip")


def _base(url: str) -> str:
    """`wss://host/ws` → `https://host`, the origin of pages of that host."""
    parts = urlsplit(url)
    return f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc.rpartition('@')[2]}"
