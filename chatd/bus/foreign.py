"""Delivers what other services publish, from the channels that the configuration lists.

Laravel puts a prefix before the name of a channel, made of the application's name, which chatd cannot know. If
chatd heard every prefix, it would deliver the messages of other applications on the same Redis. So it takes the
listed names, and logs a hint about others.
"""

from __future__ import annotations

from typing import Any

from chatd.bus import Receiver, payloads
from chatd.bus.client import MESSAGES, SIGNALS
from chatd.bus.unheard import Unheard
from chatd.config import Redis
from chatd.core.names import Names
from chatd.observe.logs import Recurring

# The name with a prefix. Without `?`, a node would receive what nodes publish themselves twice.
PREFIXED = f"?*{MESSAGES}"


class ForeignPayloads:
    def __init__(self, config: Redis, receiver: Receiver) -> None:
        self._names = Names(name for name in config.foreign_channels if name != SIGNALS)
        self._accepted, self._receiver = config.accept_foreign, receiver
        self._unheard = Unheard("foreign_channels", self._names)
        self._left_out = Recurring("foreign_ignored", every=3600)
        self.channels = self._names.exact
        self.patterns = self._names.patterns

    def take(self, item: dict[str, Any]) -> None:
        """Take a message of pub/sub, in redis-py's form."""
        if item["type"] == "pmessage" and not self._is_first(item):
            return
        foreign = payloads.foreign_of(item["data"])
        if foreign is None:
            return
        if self._accepted:
            self._receiver.foreign(*foreign)
        else:
            advice = "chatd delivers it with accept_foreign = true under [redis] in chatd.toml"
            self._left_out.warn(channel=_text(item["channel"]), advice=advice)

    def _is_first(self, item: dict[str, Any]) -> bool:
        """Whether its channel is listed, and no other subscription of ours brings the same message."""
        channel, pattern = _text(item["channel"]), _text(item["pattern"])
        entry = self._names.entry_for(channel)
        if entry is None and pattern == PREFIXED:
            self._unheard.note(channel)
        return entry == pattern


def _text(name: bytes) -> str:
    return name.decode(errors="replace")
