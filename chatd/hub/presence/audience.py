"""Tells the subscriptions that asked for it which users are online in their room: its members, and visitors,
who are in the room without being members.

Implements `listeners.Watcher`: it also reports to presence, for all nodes, which rooms are occupied on this one
and which visitors they have. It keeps the members of a room only while a subscription asks for its presence.
"""

from __future__ import annotations

from typing import Any

import trio
from msgspec import Struct

from chatd.chat.conversations import Conversations
from chatd.chat.presence import ROOMS, USERS, Presence, Transition
from chatd.core.model import MemberChange, State
from chatd.core.protocol import event, text_frame
from chatd.hub.fanout.fanout import restart
from chatd.hub.fanout.queue import Announcement, FanoutQueue
from chatd.hub.fanout.rooms import Room
from chatd.hub.fanout.subscription import Subscription
from chatd.store.read.members import MEMBERS_MOST

READ_TRIES = 3  # attempts to read the members of a room, if they change during the read
YIELD_EVERY = 200  # subscriptions between checkpoints


class Audience(Struct):
    """The members of a room, at most `MEMBERS_MOST`, at its members_version `version` (None: not read yet).

    It exists while it has `watchers`: the subscriptions that asked for presence and may be in the room.
    """

    members: set[int]
    watchers: dict[Subscription, None]
    version: int | None = None
    heard: int = 0  # the highest version in a signal that arrived while the members were read
    ahead: bool = False  # the database was behind `version` at the last sweep
    doubtful: bool = False  # an event for the watchers was lost


class Audiences:
    def __init__(
        self,
        queue: FanoutQueue,
        presence: Presence,
        conversations: Conversations,
        *,
        counts_rooms: bool,
    ) -> None:
        """`counts_rooms`: whether the occupied rooms of all nodes are counted, for webhooks or the API."""
        self._counts_rooms = counts_rooms
        self._queue, self._presence, self._conversations = queue, presence, conversations
        self._audiences: dict[int, Audience] = {}
        self._rooms_of: dict[int, set[int]] = {}  # user → conversations whose audience has the user as member

    # Watching: for subscriptions that ask for presence and may be in the room.

    async def watch(self, subscription: Subscription) -> None:
        """Read the room's members if needed, and keep them until the last watcher has left. Raises
        Unavailable.
        """
        conversation_id = subscription.conversation_id
        audience = self._audiences.get(conversation_id)
        if audience is None:
            audience = self._audiences[conversation_id] = Audience(set(), {})
        audience.watchers[subscription] = None
        for tries_left in reversed(range(READ_TRIES)):
            if audience.version is not None:
                return
            audience.heard = 0
            version, ids = await self._conversations.member_ids(conversation_id, MEMBERS_MOST)
            if self._audiences.get(conversation_id) is not audience:
                return  # the last watcher has left meanwhile
            # If the members change too fast for a consistent read, the next sweep sees that the versions
            # differ.
            if audience.version is None and (version >= audience.heard or not tries_left):
                self._fill(conversation_id, audience, version, ids)

    def unwatch(self, subscription: Subscription) -> None:
        conversation_id = subscription.conversation_id
        audience = self._audiences.get(conversation_id)
        if audience is not None and subscription in audience.watchers:
            del audience.watchers[subscription]
            if not audience.watchers:
                self._empty(conversation_id, audience)
                del self._audiences[conversation_id]

    def online(self, conversation_id: int) -> dict[str, Any]:
        """Return `{"online": sorted user ids}`, or in a crowded room `{"online_count": n}`."""
        audience = self._audiences.get(conversation_id)
        online = self._presence.who(conversation_id, audience.members if audience else ())
        if audience is not None and self._crowded(conversation_id, audience):
            return {"online_count": len(online)}
        return {"online": sorted(online)}

    def _crowded(self, conversation_id: int, audience: Audience) -> bool:
        here = len(audience.members) + len(self._presence.present(conversation_id))
        detail = self._conversations.members_detail
        return bool(detail) and here > detail

    def _fill(self, conversation_id: int, audience: Audience, version: int, ids: list[int]) -> None:
        audience.version, audience.ahead, audience.doubtful = version, False, False
        for user_id in ids:
            self._add(conversation_id, audience, user_id)

    def _add(self, conversation_id: int, audience: Audience, user_id: int) -> None:
        audience.members.add(user_id)
        self._rooms_of.setdefault(user_id, set()).add(conversation_id)

    def _remove(self, conversation_id: int, audience: Audience, user_id: int) -> None:
        audience.members.discard(user_id)
        if rooms := self._rooms_of.get(user_id):
            rooms.discard(conversation_id)
            if not rooms:
                del self._rooms_of[user_id]

    def _empty(self, conversation_id: int, audience: Audience) -> None:
        for user_id in list(audience.members):
            self._remove(conversation_id, audience, user_id)

    # Changes of members and of presence.

    def member(self, change: MemberChange) -> None:
        """Apply a change of the members. If an earlier change was lost, `version` stays behind, so that the
        sweep notices it.
        """
        audience = self._audiences.get(change.conversation_id)
        if audience is None:
            return
        if audience.version is None:
            audience.heard = max(audience.heard, change.version)
            return
        if change.version <= audience.version:
            return
        if change.version == audience.version + 1:
            audience.version = change.version
        if change.state is not State.ACTIVE:
            self._remove(change.conversation_id, audience, change.user_id)
            return
        self._add(change.conversation_id, audience, change.user_id)
        if self._presence.has(USERS, change.user_id):
            version = self._presence.version(USERS, change.user_id)
            self._tell(change.conversation_id, Transition(USERS, change.user_id, True, version))

    async def members_seen(self, room: Room, version: int) -> None:
        """The sweep has read the room's members_version: send a new answer to watchers that missed events."""
        audience = self._audiences.get(room.conversation_id)
        if audience is None:
            return
        if self._is_wrong(audience, version):
            audience.version = None
            self._empty(room.conversation_id, audience)
            wrong = list(audience.watchers)
        else:
            wrong = [subscription for subscription in audience.watchers if subscription.presence_missed]
        for count, subscription in enumerate(wrong, 1):
            subscription.presence_missed = False
            restart(subscription)
            if count % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()

    @staticmethod
    def _is_wrong(audience: Audience, version: int) -> bool:
        """Whether the members must be read again. A database version below ours may come from a read that
        began a moment earlier. Twice in a row it means that the database was set back to an older state.
        """
        was_ahead, audience.ahead = audience.ahead, audience.version is not None and version < audience.version
        if audience.version is None or audience.doubtful:
            return True
        return version > audience.version or (was_ahead and audience.ahead)

    def changed(self, change: Transition) -> None:
        """A user came online or went offline, counted over all nodes."""
        if change.scope == USERS:
            for conversation_id in self._rooms_of.get(change.id, ()):
                self._tell(conversation_id, change)
        elif change.scope != ROOMS:
            audience = self._audiences.get(change.scope)
            if audience is not None and change.id not in audience.members:
                self._tell(change.scope, change)

    def _tell(self, conversation_id: int, change: Transition) -> None:
        if self._crowded(conversation_id, self._audiences[conversation_id]):
            return
        payload = event(
            "presence",
            conversation_id=conversation_id,
            user_id=change.id,
            online=change.present,
            version=change.version,
        )
        frame = text_frame(payload)
        if not self._queue.announce(Announcement(conversation_id, frame, ephemeral=True, watchers=True)):
            self._audiences[conversation_id].doubtful = True

    # Implements `listeners.Watcher`.

    def joined(self, subscription: Subscription) -> None:
        if self._counts(subscription) and subscription.room.attended == 1:
            self._presence.arrive(ROOMS, subscription.conversation_id)

    def visit(self, subscription: Subscription, *, member: bool) -> None:
        """A snapshot was sent: now it is known whether the user is a member."""
        if subscription.visiting != (not member):
            self._count_visit(subscription, visiting=not member)

    def left(self, subscription: Subscription) -> None:
        self.unwatch(subscription)
        if subscription.visiting:
            self._count_visit(subscription, visiting=False)
        if self._counts(subscription) and not subscription.room.attended:
            self._presence.leave(ROOMS, subscription.conversation_id)

    def _counts(self, subscription: Subscription) -> bool:
        """Whether a subscription makes its room occupied. A flat listener does not: its WebSocket library
        answers pings even while its page is frozen, so the server cannot tell whether the user is there.
        """
        return self._counts_rooms and not subscription.listener.flat

    def _count_visit(self, subscription: Subscription, *, visiting: bool) -> None:
        subscription.visiting = visiting
        count = self._presence.arrive if visiting else self._presence.leave
        count(subscription.conversation_id, subscription.listener.user_id)
