"""Passes each change and signal of the bus to the part of the hub that handles it.

Implements `bus.Receiver`: its methods never wait, and the queue that they fill is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from chatd.chat.presence import Presence
from chatd.core.errors import Close, Final
from chatd.core.model import Change, Kick, MemberChange, Notice, Present, Signal, UserChange
from chatd.hub.admission.registry import Registry
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.queue import FanoutQueue
from chatd.hub.fanout.sweep import Sweep
from chatd.hub.presence.audience import Audiences
from chatd.store.read.lookups import Standing


class BusReceiver:
    def __init__(
        self,
        queue: FanoutQueue,
        fanout: Fanout,
        sweep: Sweep,
        registry: Registry,
        presence: Presence,
        audiences: Audiences,
    ) -> None:
        self._queue, self._fanout, self._sweep = queue, fanout, sweep
        self._registry, self._presence, self._audiences = registry, presence, audiences

    def changes(self, changes: Sequence[Change], committed_at: float | None = None) -> None:
        self._queue.changes(changes, committed_at)

    def foreign(self, conversation_id: int, name: str, payload: bytes) -> None:
        self._queue.foreign(conversation_id, name, payload)

    def lost(self) -> None:
        self._sweep.soon()

    def links(self, up: bool) -> None:
        self._fanout.links(up)
        self._sweep.links(up)
        if up:
            self._presence.tell_all_soon()

    def signal(self, signal: Signal) -> None:
        match signal:
            case Notice():
                self._queue.notice(signal)
            case MemberChange():
                self._queue.member(signal)
                self._audiences.member(signal)
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
