"""Checks of the daemon on this machine: its ports, its limit of open files, its calls, and a round trip."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from chatd.core.errors import OperatorError
from chatd.net.descriptors import RESERVED, client_slots
from chatd.ops.api import ApiClient, Unreachable, reached_at
from chatd.ops.client import Disconnected, NotUpgraded, connect
from chatd.ops.finding import Case, Finding, ok, problem, warning
from chatd.ops.round_trip import NoToken, travel

FEW_PLACES = 4096  # clients; the default limit of open files in most distributions allows fewer
SLOW_TRIP = 0.1  # seconds
STATES = {
    "stopping": "is stopping",
    "unavailable": "cannot use its database",
    "degraded": "runs without Redis: clients get other nodes' messages late",
}


def api(case: Case) -> Finding:
    """Whether chatd answers on api.bind and is ready."""
    backend, subject = ApiClient(case.config), "HTTP API"
    try:
        answer = backend.ask("GET", "/readyz")
    except Unreachable as error:
        return problem(
            subject, str(error).rstrip("."), "Start chatd (systemctl start chatd), or check api.bind."
        )
    state = answer.json.get("status")
    if "checks" not in answer.json:
        return problem(
            subject,
            f"another program answers on {backend.url} ({answer.status})",
            "Stop that program, or choose another port in api.bind.",
        )
    case.running = True
    if state == "ok":
        return ok(subject, f"chatd answers on {backend.url} and is ready")
    checks = ", ".join(f"{name} {how}" for name, how in answer.json["checks"].items())
    found = f"chatd on {backend.url} {STATES.get(str(state), state)} ({checks})"
    advice = "See the findings above, and journalctl -u chatd."
    return warning(subject, found, advice) if answer.status == 200 else problem(subject, found, advice)


async def websocket(case: Case) -> Finding:
    """Whether chatd sends `hello` on hub.bind."""
    subject, url = "WebSocket", _url(case)
    try:
        async with connect(url) as connection:
            hello = await connection.next()
    except NotUpgraded as error:
        return problem(
            subject,
            f"{url} answers with {error}",
            "Another program uses the port, or chatd is overloaded: check its log.",
        )
    except Disconnected as error:
        return problem(subject, f"{url}: {error}", "Start chatd, or check hub.bind.")
    return ok(subject, f"chatd answers on {url} with {hello.get('protocol')}")


def open_files(case: Case) -> Finding:
    """Whether the limit of open files allows limits.connections."""
    running = _limit_of_the_running(case) if case.running else None
    limit = running or resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    whose = "the daemon's limit" if running else "the limit here"
    subject, wanted = "open files", -(-case.config.limits.connections // case.config.server.workers)
    advice = f"LimitNOFILE={max(2 * (wanted + RESERVED), 65536)} in chatd.service, or ulimit -n"
    if limit == resource.RLIM_INFINITY:
        return ok(subject, "there is no limit")
    text = f"{whose} is {limit}: room for {client_slots(limit)} clients"
    if wanted > client_slots(limit):
        return problem(subject, f"{text}, but limits.connections allows {wanted}", advice)
    if not wanted and client_slots(limit) < FEW_PLACES:
        return warning(subject, f"{text}; further clients must wait", advice)
    return ok(subject, text)


def _limit_of_the_running(case: Case) -> int | None:
    """Return the limit from the daemon's metrics. None if there are several workers: they do not export it."""
    found = _metric(case, "process_max_fds")
    return None if found is None else int(found)


def backend_calls(case: Case) -> Iterator[Finding]:
    """Whether the backend's last answer to a login, and to a `before_message` call, was valid."""
    asked = (
        ("auth", "auth.backend_url", case.config.auth.backend_url, "auth_backend_failed"),
        (
            "before_message",
            "webhooks.before_message_url",
            case.config.webhooks.before_message_url,
            "hook_failed",
        ),
    )
    for call, key, url, event in asked:
        answers = _metric(case, f'chatd_backend_answers{{call="{call}"}}') if url and case.running else None
        if answers == 0:
            advice = f"The log has the reason: journalctl -u chatd | grep {event}"
            yield problem("calls", f"{key}: the last call had no valid answer", advice)
        elif answers is not None:
            yield ok("calls", f"{key}: no failed call is known")


def _metric(case: Case, name: str) -> float | None:
    try:
        numbers = ApiClient(case.config).ask("GET", "/metrics").body.decode(errors="replace")
    except Unreachable:
        return None
    found = [line.split()[1] for line in numbers.splitlines() if line.startswith(f"{name} ")]
    return float(found[0]) if found else None


async def round_trip(case: Case) -> Finding | None:
    """Measure the time from a post to its arrival on a WebSocket of hub.bind."""
    if not case.running:
        return None
    return await tried(case, _url(case), "round trip")


async def tried(case: Case, url: str, subject: str) -> Finding:
    """Make a round trip, and return a finding about it."""
    try:
        seconds = await travel(case, url)
    except NoToken as error:
        return ok(subject, f"not tried: {error}", "")
    except (Disconnected, OperatorError) as error:
        return problem(subject, f"through {url}: {error}", "Check the log: journalctl -u chatd.")
    text = f"a post reaches a WebSocket of {url} in {seconds * 1000:.1f} ms"
    if seconds > SLOW_TRIP:
        return warning(subject, text, "Check the load of this machine, and the speed of commits above.")
    return ok(subject, text)


def _url(case: Case) -> str:
    return f"ws://{reached_at(case.config.hub.bind)}/ws"
