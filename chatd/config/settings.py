"""The current configuration: one object that all parts of the daemon share, and that a reload changes.

Read `settings.now` at the place of use, and keep no part of it for longer than a connection. Code that derives
something from the configuration (networks, token buckets, keys) registers a callback with `follow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from chatd.config import SECTIONS, Config

# Section → keys that a reload can change; None: all keys. Every other key needs a restart, because it is about
# ports, databases and tasks, which exist already.
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
        """Call `act` with the configuration now and after each change. `act` must not raise."""
        self._followers.append(act)
        act(self.now)

    def change(self, config: Config) -> None:
        self.now = config
        for act in self._followers:
            act(config)


def merge(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """Reload `new` over `old`. Returns (the configuration from now on, keys changed, keys that need a restart).

    A key that needs a restart keeps its old value.
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
