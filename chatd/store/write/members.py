"""Members within one transaction: answers who may do what, and adds and removes members.

Only `transaction` and `permits` use this. Each answer takes the earlier commands of the group into account.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from msgspec import UNSET
from sqlalchemy import Connection

from chatd.core.errors import Muted
from chatd.core.model import MemberChange, State
from chatd.store.keys import as_parameter
from chatd.store.write import statements
from chatd.store.write.commands import Rights, SetMember

Key = tuple[int, int]  # conversation_id, user_id
Row = dict[str, Any]

MODERATOR = "moderator"  # the role that may edit and delete messages of others


class Members:
    """The members of the conversations of a group. `changes` are the ones to report to nodes and webhooks."""

    def __init__(self, connection: Connection, now: str) -> None:
        self._connection, self._now = connection, now
        self._dialect = connection.dialect.name
        self._rows: dict[Key, Row] = {}
        self._set: dict[Key, Row] = {}
        self.changes: list[MemberChange] = []

    def read(self, keys: Collection[Key]) -> None:
        if keys:
            found = self._connection.execute(statements.MEMBERS[self._dialect], as_parameter(keys)).mappings()
            self._rows = {(row["conversation_id"], row["user_id"]): dict(row) for row in found}

    def __contains__(self, key: Key) -> bool:
        """Whether there is a row, in any state."""
        return key in self._rows

    def may_enter(self, key: Key, rights: Rights) -> bool:
        if rights is Rights.TRUSTED:
            return True
        member = self._rows.get(key)
        return bool(member["state"] == State.ACTIVE) if member else rights is Rights.ENTITLED

    def check_mute(self, key: Key, rights: Rights) -> None:
        """Raises Muted."""
        member = self._rows.get(key)
        if rights is Rights.TRUSTED or member is None:
            return
        if member["muted_until"] and member["muted_until"] > self._now:
            raise Muted(until=member["muted_until"])

    def moderates(self, key: Key) -> bool:
        member = self._rows.get(key)
        return member is not None and member["role"] == MODERATOR

    def enter_quietly(self, key: Key, conversation: Row) -> None:
        """Make the author of a post a member. The room gets no event, because the message itself shows it."""
        self._put(key, conversation, State.ACTIVE, None, None, announce=True, quiet=True)

    def set(self, command: SetMember, conversation: Row) -> tuple[bool, bool]:
        """Change a member. Returns (whether there is something to write, whether the state has changed)."""
        key = (command.conversation_id, command.user_id)
        before = self._rows.get(key)
        role = (before or {}).get("role") if command.role is UNSET else command.role
        muted = (before or {}).get("muted_until") if command.muted_until is UNSET else command.muted_until
        moved = before is None or before["state"] != command.state
        written = moved or (before["role"], before["muted_until"]) != (role, muted)  # type: ignore[index]
        if written:
            shrinks = command.state is not State.ACTIVE and (before is None or before["state"] == State.ACTIVE)
            self._put(key, conversation, command.state, role, muted, announce=moved, shrinks=shrinks)
        return written, moved

    def write(self) -> None:
        if self._set:
            self._connection.execute(statements.SET_MEMBERS[self._dialect], list(self._set.values()))

    def _put(
        self,
        key: Key,
        conversation: Row,
        state: State,
        role: str | None,
        muted_until: str | None,
        *,
        announce: bool,
        shrinks: bool = False,
        quiet: bool = False,
    ) -> None:
        """`announce`: the state has changed.

        `shrinks`: the user could read the conversation and no longer can.
        """
        conversation_id, user = key
        self._rows[key] = self._set[key] = {
            "conversation_id": conversation_id,
            "user_id": user,
            "state": state.value,
            "role": role,
            "muted_until": muted_until,
            "updated_at": self._now,
        }
        if announce:
            conversation["members_version"] += 1
            version = conversation["members_version"]
            if shrinks:
                conversation["removed_version"] = version
            self.changes.append(MemberChange(conversation_id, user, state, role, version, quiet))
