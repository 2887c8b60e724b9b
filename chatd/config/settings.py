"""The configuration in force: one object for everybody, which a reload changes while the daemon runs.

Read `settings.now` where it is used, and keep no part of it for longer than a connection. Who must make
something of it first (networks, buckets, keys) follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from chatd.config import SECTIONS, Config

# Section → keys that a reload changes; None: all of them. What is not here wants a restart: it is about ports,
# databases and tasks, which exist already.
RELOADABLE: dict[str, frozenset[str] | None] = {
    "api": frozenset(["internal_token", "previous_internal_token"]),
    "hub": frozenset(["origins", "auth_timeout", "handshake_timeout"]),
    "auth": frozenset(
        [
            "secret",
            "previous_secret",
            "algorithms",
            "key_files",
            "jwks_url",
            "audience",
            "issuer",
            "leeway",
            "expiry_grace",
            "token_ttl",
        ]
    ),
    "rooms": frozenset(["client_types"]),
    "limits": None,
    "retention": None,
    "logs": frozenset(["level"]),
}


class Settings:
    def __init__(self, config: Config) -> None:
        self.now = config
        self._followers: list[Callable[[Config], None]] = []

    def follow(self, act: Callable[[Config], None]) -> None:
        """Call it with the configuration: now, and after each change. It must not fail."""
        self._followers.append(act)
        act(self.now)

    def change(self, config: Config) -> None:
        self.now = config
        for act in self._followers:
            act(config)


def merge(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """What a reload makes of two configurations: the one in force from now on, the keys that change in it, and
    those that would need a restart.
    """
    changed: list[str] = []
    restart: list[str] = []
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        before, after = getattr(old, name), getattr(new, name)
        allowed = RELOADABLE.get(name, frozenset())
        taken: dict[str, Any] = {}
        for key in kind.__struct_fields__:
            if getattr(before, key) == getattr(after, key):
                continue
            if allowed is None or key in allowed:
                taken[key] = getattr(after, key)
                changed.append(f"{name}.{key}")
            else:
                restart.append(f"{name}.{key}")
        sections[name] = msgspec.structs.replace(before, **taken)
    return msgspec.structs.replace(old, **sections), changed, restart
