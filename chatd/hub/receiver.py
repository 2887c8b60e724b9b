"""What the bus brings, handed to whom it concerns. Implements `bus.Receiver`: synchronous and bounded."""

from __future__ import annotations

import trio

from chatd.chat.presence import Presence
from chatd.core.errors import Close, Final
from chatd.core.model import Kick, MemberChange, Notice, Present, Signal, UserChange
from chatd.hub.admission.registry import Registry
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.presence.audience import Audiences
from chatd.store.read.lookups import Standing


class BusReceiver:
    def __init__(self, fanout: Fanout, registry: Registry, presence: Presence) -> None:
        self._registry, self._presence, self._fanout = registry, presence, fanout
        self.audiences: Audiences | None = None
        self.changes = fanout.changes
        self.foreign = fanout.foreign
        self.lost = fanout.lost

    def links(self, up: bool) -> None:
        self._fanout.links(up)
        if up:
            self._presence.tell_all_soon()

    def signal(self, signal: Signal) -> None:
        match signal:
            case Notice():
                self._fanout.notice(signal)
            case MemberChange():
                self._fanout.member(signal)
                if self.audiences is not None:
                    self.audiences.member(signal)
            case Present():
                self._presence.hear(signal)
            case UserChange():
                self._revoke(signal)
            case Kick():
                self._kick(signal)

    def _revoke(self, change: UserChange) -> None:
        self._registry.judge(change.user_id, Standing(change.valid_after, change.banned_until))

    def _kick(self, kick: Kick) -> None:
        for guest in self._registry.guests_of(kick.user_id, before=trio.current_time() - kick.age):
            if kick.reconnect:
                guest.line.close_soon(Close.ASKED_TO_RECONNECT, "disconnected by the backend")
            else:
                guest.line.close_for_good(Final.DISCONNECTED)
