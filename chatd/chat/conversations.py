"""Enters conversations: reads rights, head and missed changes from one snapshot of the database."""

from __future__ import annotations

from collections.abc import Mapping

from chatd.chat.logins import check_standing
from chatd.chat.presence import Presence
from chatd.config.settings import Settings
from chatd.core.errors import NotFound
from chatd.core.limits import INBOX_ROOMS
from chatd.core.model import Identity, Position
from chatd.store.read import lookups, members
from chatd.store.read.batching import Batcher
from chatd.store.read.members import ConversationState
from chatd.store.read.reader import Reader
from chatd.store.read.snapshots import Entered, Entry, Snapshot, logins
from chatd.store.write.commands import Rights


class Conversations:
    def __init__(self, read: Reader, settings: Settings, presence: Presence) -> None:
        self._presence = presence
        self._read = read
        self._enter: Batcher[Entry, Entered] = Batcher(read, logins, _weight, _user)
        self._settings = settings
        self._open = settings.now.rooms.access == "open"

    @property
    def members_detail(self) -> int:
        """In rooms with more members than this, users see no receipts and presence of others; 0: no limit."""
        return self._settings.now.limits.members_detail

    def entitled(self, identity: Identity, conversation_id: int) -> bool:
        """Whether the user may enter if no row of `chat_members` says otherwise."""
        return self._open or conversation_id in identity.conversations

    def rights(self, identity: Identity, conversation_id: int) -> Rights:
        return Rights.ENTITLED if self.entitled(identity, conversation_id) else Rights.MEMBER

    async def enter(
        self, identity: Identity, conversation_id: int, position: Position, epoch: str | None = None
    ) -> Snapshot:
        """Enter a conversation. Raises NotFound if the user may not enter, Unavailable."""
        found = await self._enter(self._entry(identity, {conversation_id: position}, epoch))
        return _snapshot_of(found, conversation_id)

    async def read_on(
        self, identity: Identity, conversation_id: int, position: Position, epoch: str | None
    ) -> Snapshot:
        """The next portion of changes for a live subscription that lags behind.

        Raises the errors of `enter`.
        """
        found = await self._enter(self._entry(identity, {conversation_id: position}, epoch, portion=True))
        return _snapshot_of(found, conversation_id)

    async def enter_all(self, identity: Identity, rooms: Mapping[int, Position], epoch: str | None) -> Entered:
        """Enter several conversations in one snapshot. Changes that do not fit into a
        `ready` are left for later.

        Raises Revoked if the user's login was revoked or the user is banned, Outdated, NotYet, Unavailable.
        """
        found = await self._enter(self._entry(identity, rooms, epoch, brief=True))
        check_standing(identity, found.standing, self._settings.now.auth.leeway)
        return found

    def _entry(
        self, identity: Identity, rooms: Mapping[int, Position], epoch: str | None, **how: bool
    ) -> Entry:
        wanted = [(id, position, self.entitled(identity, id)) for id, position in rooms.items()]
        return Entry(identity.user_id, wanted, epoch, self.members_detail, **how)

    async def get(self, conversation_id: int) -> tuple[ConversationState, list[int]]:
        """For a backend: (state of a conversation, ids of users online in it). Raises NotFound, Unavailable."""
        state = await self._read(members.conversation_state, conversation_id, self.members_detail)
        return state, sorted(self._presence.who(conversation_id, state.member_ids))

    async def member_ids(self, conversation_id: int, most: int) -> tuple[int, list[int]]:
        """(members_version, at most `most` member ids), from one snapshot. Raises Unavailable."""
        return await self._read(members.member_ids, conversation_id, most)

    async def inbox(self, identity: Identity) -> list[int]:
        """Ids of the user's conversations, the most recently active first. Raises Unavailable."""
        return await self._read(lookups.conversations_of, identity.user_id, INBOX_ROOMS)


def _snapshot_of(found: Entered, conversation_id: int) -> Snapshot:
    if isinstance(snapshot := found.rooms[conversation_id], NotFound):
        raise snapshot
    return snapshot


def _weight(entry: Entry) -> int:
    """The weight of an entry in a batch. A room whose changes may have to be read counts four times."""
    return 1 + sum(1 if position.after is None else 4 for _, position, _ in entry.rooms)


def _user(entry: Entry) -> int:
    return entry.user_id
