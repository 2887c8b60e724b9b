"""Members of a conversation: added and removed by the backend, effective on live connections at once."""

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


MISSPELT = 0.85  # how close a name is to another that is meant: "operator" is not


def check_role(role: str | None) -> None:
    """One role gives a right; any other is a name of the application's own.

    Raises BadRequest for what looks like the one and would give nothing.
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
        """Also how a removed or banned user comes back, and how a role or a mute changes."""
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
        """Leaves a row behind, which beats what a token lists."""
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
