"""Checks whether connected users were banned or their tokens revoked. Each sweep runs it, because the bus may
have lost the signal that said so.
"""

from __future__ import annotations

from chatd.chat.logins import Logins
from chatd.hub.admission.registry import Registry

USERS_AT_ONCE = 500  # users in one query


async def check_standings(registry: Registry, logins: Logins) -> None:
    """Close the sessions of users whose tokens were revoked or who were banned. Raises Unavailable."""
    registry.tidy()
    users = registry.users()
    for start in range(0, len(users), USERS_AT_ONCE):
        standings = await logins.standings(users[start : start + USERS_AT_ONCE])
        for user_id, standing in standings.items():
            registry.judge(user_id, standing)
