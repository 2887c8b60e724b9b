"""The backend: how it answers chatd's question about a login."""

from __future__ import annotations

from chatd.backend.auth_callback import AuthCallback
from chatd.backend.fetch import Fetcher
from chatd.config.settings import Settings
from chatd.core.errors import CallFailed, Unauthorized
from chatd.ops.finding import Case, Finding, ok, problem, warning

NOBODYS = "chatd-doctor"  # a token of no user: the right answer is a refusal


async def login(case: Case) -> Finding | None:
    """Whether auth.backend_url refuses a token that belongs to no user, and does so as agreed."""
    subject, key = "login", "auth.backend_url"
    if not case.config.auth.backend_url:
        return None
    fetch = Fetcher(case.config.server.private_networks)
    try:
        found = await AuthCallback(Settings(case.config), fetch).authenticate(NOBODYS)
    except CallFailed as error:
        advice = error.advice or "See whether the backend runs, and whether this address is right."
        return problem(subject, f"{key}: {error.reason}", advice)
    except Unauthorized as error:
        if error.why.endswith("404"):
            advice = "See whether the address is right; to refuse a token, answer 401."
            return warning(
                subject, f"{key}: {error.why}, as it does for an address that does not exist", advice
            )
        return ok(subject, f"{key} refuses a token that belongs to no user: {error.why}")
    finally:
        await fetch.close()
    text = f"{key} accepts the made-up token {NOBODYS!r} as that of user {found.user_id}"
    return problem(subject, text, "Let it answer 401 for every token that it does not know.")
