"""Compares the rows of a batch with what chatd has: what is new, what is there already, what contradicts it.

It only reads, so a dry run does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection, bindparam, func, select

from chatd.store.imports.records import Problem, Row
from chatd.store.keys import as_parameter
from chatd.store.schema import messages
from chatd.store.write import statements

NO_HASH = bytes(16)  # of a message whose author was erased

OTHER = "is that of another message, or of another version of this one, in chatd"
TOO_LATE = "is lower than that of a message which its conversation has in chatd: import the older ones first"
CLIENT_ID_TAKEN = "is that of another message of this user in this conversation"

_NEWEST_ID = select(func.max(messages.c.id))
_names = ("id", "chat_conversation_id", "user_id", "created_at", "client_id", "request_hash", "deleted_at")
_EXISTING = select(*[messages.c[name] for name in _names]).where(
    messages.c.id.between(bindparam("first"), bindparam("last"))
)


class Verdict(Struct, frozen=True):
    """`fresh`: the rows to write. `there`: the number of rows that chatd has already."""

    fresh: list[Row]
    there: int
    refused: list[tuple[Row, Problem]]


class Judge:
    def __init__(self) -> None:
        self._client_ids: set[int] = set()  # hashes of the keys of all rows so far

    def __call__(self, connection: Connection, rows: Sequence[Row]) -> Verdict:
        """`rows` are in the order of their ids, and come after those of the calls before."""
        newest = connection.scalar(_NEWEST_ID) or 0
        found = _existing(connection, rows) if rows[0].id <= newest else {}
        heads = _heads(connection, rows) if rows[0].id <= newest else {}
        taken = _taken(connection, [row for row in rows if row.client_id is not None and row.id not in found])
        verdict = Verdict([], 0, [])
        there = 0
        for row in rows:
            problem = None
            if row.id in found:
                problem = None if _same(row, found[row.id]) else Problem("id", OTHER, row.id)
                there += problem is None
            elif row.id < heads.get(row.conversation_id, 0):
                problem = Problem("id", TOO_LATE, row.id)
            if row.client_id is not None and problem is None and not self._is_new(row, taken):
                problem = Problem("client_id", CLIENT_ID_TAKEN, row.client_id)
            if problem is not None:
                verdict.refused.append((row, problem))
            elif row.id not in found:
                verdict.fresh.append(row)
        return Verdict(verdict.fresh, there, verdict.refused)

    def _is_new(self, row: Row, taken: set[tuple[int, int, str]]) -> bool:
        key = (row.conversation_id, row.user_id, row.client_id or "")
        if key in taken or hash(key) in self._client_ids:
            return False
        self._client_ids.add(hash(key))
        return True


def _existing(connection: Connection, rows: Sequence[Row]) -> dict[int, Any]:
    asked = {"first": rows[0].id, "last": rows[-1].id}
    return {found.id: found for found in connection.execute(_EXISTING, asked)}


def _heads(connection: Connection, rows: Sequence[Row]) -> dict[int, int]:
    """conversation_id → the id of its newest message."""
    wanted = as_parameter({(row.conversation_id,) for row in rows})
    query = statements.NEWEST_MESSAGES[connection.dialect.name]
    return {id: newest for id, newest in connection.execute(query, wanted) if newest}


def _taken(connection: Connection, rows: Sequence[Row]) -> set[tuple[int, int, str]]:
    """The idempotency keys of these rows that messages in chatd have."""
    if not rows:
        return set()
    keys = as_parameter({(row.conversation_id, row.user_id, row.client_id) for row in rows})
    found = connection.execute(statements.EARLIER_MESSAGES[connection.dialect.name], keys)
    return {(one.chat_conversation_id, one.user_id, one.client_id) for one in found}


def _same(row: Row, found: Any) -> bool:
    """Whether chatd has this row. An edit or a deletion in chatd since makes it no other message."""
    place = (found.chat_conversation_id, found.user_id, found.created_at)
    if place != (row.conversation_id, row.user_id, row.created_at):
        return False
    if found.request_hash == NO_HASH:
        return True
    said = (found.request_hash, found.client_id) == (row.request_hash, row.client_id)
    return said and (row.deleted_at is None or found.deleted_at is not None)
