"""Enter a conversation: rights, head and what was missed, in one snapshot of the database."""

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
        """In rooms with more members nobody hears of others' receipts and presence; 0: no limit."""
        return self._settings.now.limits.members_detail

    def entitled(self, identity: Identity, conversation_id: int) -> bool:
        """Whether the user may enter if no row of `chat_members` says otherwise."""
        return self._open or conversation_id in identity.conversations

    def rights(self, identity: Identity, conversation_id: int) -> Rights:
        return Rights.ENTITLED if self.entitled(identity, conversation_id) else Rights.MEMBER

    async def enter(
        self, identity: Identity, conversation_id: int, position: Position, epoch: str | None = None
    ) -> Snapshot:
        """Raises NotFound where the user may not look, Unavailable."""
        found = await self._enter(self._entry(identity, {conversation_id: position}, epoch))
        return _the_one(found, conversation_id)

    async def read_on(
        self, identity: Identity, conversation_id: int, position: Position, epoch: str | None
    ) -> Snapshot:
        """The next portion for somebody who is in the room and has fallen behind. Raises as `enter` does."""
        found = await self._enter(self._entry(identity, {conversation_id: position}, epoch, portion=True))
        return _the_one(found, conversation_id)

    async def enter_all(self, identity: Identity, rooms: Mapping[int, Position], epoch: str | None) -> Entered:
        """Several conversations as of one moment; what does not fit into a `ready` is left for later.

        Raises Revoked for a user who may not be here at all, Outdated, NotYet, Unavailable.
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
        """For a backend: where it stands, and who is online. Raises NotFound, Unavailable."""
        state = await self._read(members.conversation_state, conversation_id, self.members_detail)
        return state, sorted(self._presence.who(conversation_id, state.member_ids))

    async def member_ids(self, conversation_id: int, most: int) -> tuple[int, list[int]]:
        """The members_version, and at most so many members as of it. Raises Unavailable."""
        return await self._read(members.member_ids, conversation_id, most)

    async def inbox(self, identity: Identity) -> list[int]:
        """The user's conversations, the most recently active first."""
        return await self._read(lookups.conversations_of, identity.user_id, INBOX_ROOMS)


def _the_one(found: Entered, conversation_id: int) -> Snapshot:
    if isinstance(snapshot := found.rooms[conversation_id], NotFound):
        raise snapshot
    return snapshot


def _weight(entry: Entry) -> int:
    """Of a gathered read: a room whose changes may have to be read too counts four times."""
    return 1 + sum(1 if position.after is None else 4 for _, position, _ in entry.rooms)


def _user(entry: Entry) -> int:
    return entry.user_id
