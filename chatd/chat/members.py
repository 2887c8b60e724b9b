"""Adds and removes members of a conversation for the backend. Live connections feel the effect at once."""

from __future__ import annotations

import difflib

import structlog
from msgspec import UNSET, UnsetType

from chatd.core.errors import BadRequest
from chatd.core.model import State
from chatd.core.protocol import check_label
from chatd.store.write.commands import SetMember
from chatd.store.write.members import MODERATOR
from chatd.store.write.writer import Writer

log = structlog.get_logger()


MISSPELT = 0.85  # least similarity of a misspelt role to the right one; "operator" is not similar enough


def check_role(role: str | None) -> None:
    """Check a role. Only `moderator` gives rights; every other role is the application's own name.

    Raises BadRequest for a misspelt `moderator`, which would silently give no rights.
    """
    check_label("role", role)
    if role is None or role == MODERATOR:
        return
    if difflib.get_close_matches(role.strip().lower(), [MODERATOR], cutoff=MISSPELT):
        raise BadRequest(f"The role {role!r} gives no right: did you mean {MODERATOR!r}?", field="role")


class Members:
    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def add(
        self,
        conversation_id: int,
        user_id: int,
        *,
        role: str | UnsetType | None = UNSET,
        muted_until: str | UnsetType | None = UNSET,
    ) -> None:
        """Add a member, bring back a removed or banned one, or change a role or a mute.

        Arguments that are UNSET leave the value as it is. Raises Unavailable.
        """
        await self._set(
            SetMember(
                conversation_id=conversation_id,
                user_id=user_id,
                state=State.ACTIVE,
                role=role,
                muted_until=muted_until,
            )
        )

    async def remove(self, conversation_id: int, user_id: int, *, ban: bool = False) -> None:
        """Remove a member or ban a user. Raises Unavailable.

        The member's row stays in the database with its new state, so that a token that lists the conversation
        does not let the user in.
        """
        state = State.BANNED if ban else State.REMOVED
        await self._set(SetMember(conversation_id=conversation_id, user_id=user_id, state=state))

    async def _set(self, command: SetMember) -> None:
        await self._writer.submit([command]).outcome()
        log.info(
            "member_set",
            conversation_id=command.conversation_id,
            user_id=command.user_id,
            state=command.state.value,
        )
