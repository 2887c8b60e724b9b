"""What the database is asked: the log, pages of history, heads, rights. Snapshots are in `snapshots`.

Plain functions of a connection, run by `Reader` in threads; each call sees one moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct
from sqlalchemy import Connection

from chatd import limits
from chatd.errors import NotFound
from chatd.model import Change, Kind, Message, State
from chatd.protocol import change_payload
from chatd.store import queries
from chatd.store.rows import message


class Heads(Struct, frozen=True):
    seq: int
    members_version: int


class Page(Struct, frozen=True):
    messages: list[Message]
    has_more: bool


class Standing(Struct, frozen=True):
    """What is held against a user's tokens: unix seconds, and a moment or None."""

    valid_after: int = 0
    banned_until: str | None = None


def revision(connection: Connection) -> str:
    """The version of its schema, as it is now."""
    return str(connection.scalar(queries.REVISION))


def changes_after(connection: Connection, conversation_id: int, after: int) -> tuple[list[Change], bool]:
    """The log after a seq, with the messages as they are now; False if that was too much for one answer."""
    asked = {"conversation_id": conversation_id, "after": after, "most": limits.REPLAY_CHANGES + 1}
    found: list[Change] = []
    space = limits.REPLAY_BYTES
    for row in connection.execute(queries.CHANGES_AFTER, asked).mappings():
        kind = Kind(row["kind"])
        payload = change_payload(kind, row["change_seq"], message(row))
        space -= len(payload)
        if space < 0 or len(found) == limits.REPLAY_CHANGES:
            return found, False
        found.append(Change(conversation_id, row["change_seq"], kind, payload))
    return found, True


def missing(connection: Connection, conversation_id: int, after: int) -> tuple[list[Change], Heads | None]:
    """The log after a seq, and where the conversation stands; no changes where those are too many."""
    head = heads(connection, [conversation_id]).get(conversation_id)
    changes, complete = changes_after(connection, conversation_id, after)
    if head is None or not complete:
        return [], head
    version = head.members_version
    return [msgspec.structs.replace(change, members_version=version) for change in changes], head


def history(
    connection: Connection, conversation_id: int, before: int | None, after: int | None, limit: int
) -> Page:
    """A page in ascending id: the newest, or next to a message id; cut where it has too many bytes."""
    asked = {"conversation_id": conversation_id, "before": before, "after": after, "most": limit + 1}
    query = queries.NEWEST_MESSAGES if before is None else queries.MESSAGES_BEFORE
    if after is not None:
        query = queries.MESSAGES_AFTER
    found: list[Message] = []
    space, has_more = limits.REPLAY_BYTES, False
    for row in connection.execute(query, asked).mappings():
        one = message(row)
        space -= len(change_payload(Kind.CREATED, one.seq, one))
        if len(found) == limit or (space < 0 and found):
            has_more = True
            break
        found.append(one)
    return Page(found if after is not None else found[::-1], has_more)


def history_for(
    connection: Connection,
    user_id: int,
    entitled: bool,
    conversation_id: int,
    before: int | None,
    after: int | None,
    limit: int,
) -> Page:
    check_rights(connection, conversation_id, user_id, entitled)
    return history(connection, conversation_id, before, after, limit)


def check_rights(connection: Connection, conversation_id: int, user_id: int, entitled: bool) -> None:
    """A row decides; without one the token or an open deployment does."""
    if not may(states(connection, conversation_id, [user_id]).get(user_id), entitled):
        raise NotFound(field="conversation_id")


def may(state: State | None, entitled: bool) -> bool:
    return state is State.ACTIVE if state else entitled


def states(connection: Connection, conversation_id: int, user_ids: Sequence[int]) -> dict[int, State]:
    asked = {"conversation_id": conversation_id, "user_ids": user_ids}
    return {row.user_id: State(row.state) for row in connection.execute(queries.STATES, asked)}


def rights(
    connection: Connection, conversation_id: int, user_ids: Sequence[int]
) -> tuple[int, dict[int, State]]:
    """(members_version, states) in one snapshot."""
    head = heads(connection, [conversation_id]).get(conversation_id)
    return head.members_version if head else 0, states(connection, conversation_id, user_ids)


def heads(connection: Connection, conversation_ids: Sequence[int]) -> dict[int, Heads]:
    rows = connection.execute(queries.HEADS, {"conversation_ids": conversation_ids})
    return {row.id: Heads(row.last_seq, row.members_version) for row in rows}


def standings(connection: Connection, user_ids: Sequence[int]) -> dict[int, Standing]:
    rows = connection.execute(queries.STANDINGS, {"user_ids": user_ids})
    return {row.user_id: Standing(row.valid_after, row.banned_until) for row in rows}


def conversations_of(connection: Connection, user_id: int, most: int) -> list[int]:
    """The user's conversations, the most recently active first."""
    return list(connection.scalars(queries.CONVERSATIONS_OF_USER, {"user_id": user_id, "most": most}))
