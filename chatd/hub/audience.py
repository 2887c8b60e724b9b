"""Who is online in a room, for those who asked: members, and who is in it without being one.

Implements `rooms.Watcher`: it also counts, for all nodes, the rooms of this one and the visitors in them.
Nothing is kept of a room that nobody asked about.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from chatd.chat.conversations import Conversations
from chatd.chat.presence import ROOMS, USERS, Presence, Transition
from chatd.hub.fanout import Announcement, Fanout, restart
from chatd.hub.rooms import Room, Rooms, Subscription
from chatd.model import MemberChange, State
from chatd.protocol import event, text_frame
from chatd.store.people import PEOPLE

READ_TRIES = 3  # of a room whose members change while they are read


class Audience(Struct):
    """The members of a room, at most `PEOPLE`. `version` counts what has changed since it was made."""

    members: set[int]
    loaded: bool = False
    version: int = 0


class Audiences:
    def __init__(
        self,
        rooms: Rooms,
        fanout: Fanout,
        presence: Presence,
        conversations: Conversations,
        *,
        counts_rooms: bool,
    ) -> None:
        """`counts_rooms`: somebody wants to know which rooms are occupied, over all nodes."""
        self._counts_rooms = counts_rooms
        self._rooms, self._fanout, self._presence = rooms, fanout, presence
        self._conversations = conversations
        self._audiences: dict[int, Audience] = {}
        self._rooms_of: dict[int, set[int]] = {}  # user → conversations whose audience has them
        rooms.watcher = self
        presence.watchers.append(self._changed)
        fanout.sweep.members_missed = self._missed

    # For a subscription that asks.

    async def load(self, conversation_id: int) -> None:
        """Know the members from now on. Raises Unavailable."""
        for _ in range(READ_TRIES):
            if audience := self._audiences.get(conversation_id):
                if audience.loaded:
                    return
            else:
                audience = self._audiences[conversation_id] = Audience(set())
            before = audience.version
            ids = await self._conversations.member_ids(conversation_id, PEOPLE)
            if audience.version == before:
                self._fill(conversation_id, audience, ids)
                return

    def online(self, conversation_id: int) -> dict[str, Any]:
        """`online`: who is; in a crowded room `online_count`: how many."""
        audience = self._audiences.get(conversation_id)
        online = self._presence.who(conversation_id, audience.members if audience else ())
        if audience is not None and self._crowded(conversation_id, audience):
            return {"online_count": len(online)}
        return {"online": sorted(online)}

    def _crowded(self, conversation_id: int, audience: Audience) -> bool:
        here = len(audience.members) + len(self._presence.present(conversation_id))
        detail = self._conversations.members_detail
        return bool(detail) and here > detail

    def _fill(self, conversation_id: int, audience: Audience, ids: list[int]) -> None:
        if self._audiences.get(conversation_id) is not audience:
            return  # the last who asked has left meanwhile
        audience.loaded = True
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

    def _forget(self, conversation_id: int) -> None:
        if audience := self._audiences.pop(conversation_id, None):
            for user_id in list(audience.members):
                self._remove(conversation_id, audience, user_id)

    # What changes.

    def member(self, change: MemberChange) -> None:
        audience = self._audiences.get(change.conversation_id)
        if audience is None:
            return
        audience.version += 1
        if change.state is State.ACTIVE:
            self._add(change.conversation_id, audience, change.user_id)
            if self._presence.has(USERS, change.user_id):
                version = self._presence.version(USERS, change.user_id)
                self._tell(change.conversation_id, Transition(USERS, change.user_id, True, version, ours=False))
        else:
            self._remove(change.conversation_id, audience, change.user_id)

    def _missed(self, room: Room) -> None:
        """Members have changed and nobody has told us: who asked is answered anew."""
        if room.conversation_id in self._audiences:
            self._forget(room.conversation_id)
            for subscription in list(room.subscriptions):
                if subscription.presence:
                    restart(subscription)

    def _changed(self, change: Transition) -> None:
        if change.place == USERS:
            for conversation_id in self._rooms_of.get(change.id, ()):
                self._tell(conversation_id, change)
        elif change.place != ROOMS:
            audience = self._audiences.get(change.place)
            if audience is not None and change.id not in audience.members:
                self._tell(change.place, change)

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
        self._fanout.announce(Announcement(conversation_id, text_frame(payload), ephemeral=True, watchers=True))

    # Implements `rooms.Watcher`.

    def opened(self, room: Room) -> None:
        if self._counts_rooms:
            self._presence.arrive(ROOMS, room.conversation_id)

    def closed(self, room: Room) -> None:
        if self._counts_rooms:
            self._presence.leave(ROOMS, room.conversation_id)
        self._forget(room.conversation_id)

    def visit(self, subscription: Subscription, *, member: bool) -> None:
        """A snapshot was answered: now it is known whether the user is a member."""
        if subscription.visiting != (not member):
            self._count_visit(subscription, visiting=not member)

    def left(self, subscription: Subscription) -> None:
        if subscription.visiting:
            self._count_visit(subscription, visiting=False)

    def _count_visit(self, subscription: Subscription, *, visiting: bool) -> None:
        subscription.visiting = visiting
        count = self._presence.arrive if visiting else self._presence.leave
        count(subscription.conversation_id, subscription.listener.user_id)
