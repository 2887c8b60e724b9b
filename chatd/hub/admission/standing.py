"""Whether those who are connected may stay: part of each sweep, whatever the bus has told."""

from __future__ import annotations

from chatd.chat.logins import Logins
from chatd.hub.admission.registry import Registry

USERS_AT_ONCE = 500  # in one query, and between checkpoints


async def check_standings(registry: Registry, logins: Logins) -> None:
    """End the sessions of users whose tokens were revoked or who were banned. Raises Unavailable."""
    registry.tidy()
    users = registry.users()
    for start in range(0, len(users), USERS_AT_ONCE):
        standings = await logins.standings(users[start : start + USERS_AT_ONCE])
        for user_id, standing in standings.items():
            registry.judge(user_id, standing)
