"""Members within one transaction: who may do what in the conversations of a group, and who comes and goes.

Used by `transaction` and `permits`. Each answer sees what the commands before it in the group did.
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

MODERATOR = "moderator"  # the role that may change what others wrote


class Members:
    """`changes` are those that others are told of."""

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
        """Whether there is a row, whatever it says."""
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
        """Somebody becomes a member by posting: the message says it."""
        self._put(key, conversation, State.ACTIVE, None, None, announce=True, quiet=True)

    def set(self, command: SetMember, conversation: Row) -> tuple[bool, bool]:
        """(whether anything is to be written, whether the member was in another state before)"""
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
        """`announce`: somebody has come or gone. `shrinks`: who was allowed to listen no longer is."""
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
