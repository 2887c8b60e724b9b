"""Reads the log, pages of history, heads and rights. `snapshots` has the reads for a client that enters rooms.

These are plain functions of a connection. `Reader` runs each in a thread, within one snapshot of the database.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Struct
from sqlalchemy import Connection

from chatd.core import limits
from chatd.core.errors import NotFound
from chatd.core.model import Change, Kind, Message, State
from chatd.core.protocol import change_payload
from chatd.store import keys
from chatd.store.read import statements
from chatd.store.rows import message, removed_message


class Heads(Struct, frozen=True):
    """The counters of a conversation.

    `seq` and `mark` are those of its last change. Retention has removed the log up to `low_seq`.
    """

    seq: int = 0
    low_seq: int = 0
    members_version: int = 0
    removed_version: int = 0
    mark: str | None = None


class Missing(Struct, frozen=True):
    """The changes after a position; none if there are too many.

    `same`: the position belongs to the present history of the database. If not, there are no
    changes to follow it.
    """

    changes: list[Change]
    heads: Heads
    same: bool


class Page(Struct, frozen=True):
    messages: list[Message]
    has_more: bool


class Standing(Struct, frozen=True):
    """The restrictions of a user. Tokens from before `valid_after` (unix seconds) are void.

    `banned_until` is a time; None: not banned.
    """

    valid_after: int = 0
    banned_until: str | None = None


def revision(connection: Connection) -> str:
    """The present version of the schema."""
    return str(connection.scalar(statements.REVISION))


def epoch_of(connection: Connection) -> str:
    """The name of the database's present history, for cursors without a mark.

    It is the random value of the database plus PostgreSQL's timeline, because a promoted standby may lack
    changes and starts a new timeline. Timeline 1 adds nothing, so that epochs of older versions of chatd, which
    knew no timelines, stay valid. A session reads its epoch once, since its timeline cannot change.
    """
    if (known := connection.info.get("epoch")) is not None:
        return str(known)
    random, timeline = connection.scalar(statements.EPOCH), connection.info.get("timeline")
    epoch = connection.info["epoch"] = f"{random}-{timeline}" if (timeline or 1) > 1 else f"{random}"
    return epoch


def changes_after(
    connection: Connection, conversation_id: int, after: int, space: int = limits.REPLAY_BYTES
) -> tuple[list[Change], bool]:
    """(changes after a seq, whether these are all). Each change has its message as it is now.

    The changes take at most `space` bytes and number at most REPLAY_CHANGES; the first one is always included.
    """
    asked = {"conversation_id": conversation_id, "after": after, "most": limits.REPLAY_CHANGES + 1}
    found: list[Change] = []
    removed: dict[int, Message] | None = None
    for row in connection.execute(statements.CHANGES_AFTER, asked).mappings():
        kind = Kind(row["kind"])
        if row["id"] is not None:
            changed: Message | None = message(row)
        else:  # retention has removed the message: report it as deleted
            removed = _removed_after(connection, asked) if removed is None else removed
            kind, changed = Kind.DELETED, removed.get(row["message_id"])
        if changed is None:
            return found, False
        payload = change_payload(kind, row["change_seq"], changed, row["mark"])
        space -= len(payload)
        if found and (space < 0 or len(found) == limits.REPLAY_CHANGES):
            return found, False
        found.append(Change(conversation_id, row["change_seq"], kind, payload, mark=row["mark"]))
    return found, True


def _removed_after(connection: Connection, asked: dict[str, int]) -> dict[int, Message]:
    return {
        row["message_id"]: removed_message(row)
        for row in connection.execute(statements.REMOVED_AFTER, asked).mappings()
    }


def missing(connection: Connection, conversation_id: int, after: int, mark: str | None) -> Missing:
    """The changes after the change `after`, which must have this mark."""
    found = heads(connection, [conversation_id]).get(conversation_id, Heads())
    marks = marks_of(connection, [(conversation_id, after)]) if found.low_seq <= after < found.seq else {}
    if not is_of(conversation_id, after, mark, found, marks):
        return Missing([], found, same=False)
    changes, complete = changes_after(connection, conversation_id, after)
    return Missing(list(_chained(changes, mark, found)) if complete else [], found, same=True)


def _chained(changes: Sequence[Change], previous: str | None, heads: Heads) -> Iterator[Change]:
    """Give each change the mark of the one before it. They come from one log, so each follows the other."""
    for change in changes:
        version = heads.removed_version
        yield msgspec.structs.replace(change, members_version=version, previous=previous)
        previous = change.mark


Marks = dict[tuple[int, int], str | None]


def marks_of(connection: Connection, wanted: Sequence[tuple[int, int]]) -> Marks:
    """The marks of changes: (conversation_id, seq) → mark. Changes that are not in the log are left out."""
    if not wanted:
        return {}
    rows = connection.execute(statements.MARKS[connection.dialect.name], keys.as_parameter(wanted))
    return {(row.conversation_id, row.seq): row.mark for row in rows}


def is_of(conversation_id: int, after: int, mark: str | None, heads: Heads, marks: Marks) -> bool:
    """Whether the change `after` of this conversation has this mark, that is, belongs to the present history.

    `marks` must have the change's mark, except for the last change, whose mark is in `heads`. Retention keeps
    the change at `low_seq` in the log for this purpose. Versions of chatd before marks did not keep it; there
    the mark is None.
    """
    if after in (0, heads.seq):
        return mark == (heads.mark if after else None)
    if after > heads.seq:
        return False
    cut = {(conversation_id, heads.low_seq): None}
    return (conversation_id, after) in (found := cut | marks) and found[conversation_id, after] == mark


def history(
    connection: Connection,
    conversation_id: int,
    before: int | None,
    after: int | None,
    limit: int,
    space: int = limits.REPLAY_BYTES,
) -> Page:
    """A page of messages in ascending id: those before or after a message id, or the newest.

    It has at most `limit` messages and `space` bytes of JSON, but at least one message if there is any.
    """
    asked = {"conversation_id": conversation_id, "before": before, "after": after, "most": limit + 1}
    query = statements.NEWEST_MESSAGES if before is None else statements.MESSAGES_BEFORE
    if after is not None:
        query = statements.MESSAGES_AFTER
    found: list[Message] = []
    has_more = False
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
    """Raises NotFound if the user may not read the conversation.

    `entitled`: what holds without a members' row.
    """
    if not may(states(connection, conversation_id, [user_id]).get(user_id), entitled):
        raise NotFound(field="conversation_id")


def may(state: State | None, entitled: bool) -> bool:
    return state is State.ACTIVE if state else entitled


def states(connection: Connection, conversation_id: int, user_ids: Sequence[int]) -> dict[int, State]:
    asked = {"conversation_id": conversation_id, "user_ids": user_ids}
    return {row.user_id: State(row.state) for row in connection.execute(statements.STATES, asked)}


def rights(
    connection: Connection, conversation_id: int, user_ids: Sequence[int]
) -> tuple[int, dict[int, State]]:
    """(members_version, user → state) of a conversation, from one snapshot."""
    head = heads(connection, [conversation_id]).get(conversation_id)
    return head.members_version if head else 0, states(connection, conversation_id, user_ids)


def heads(connection: Connection, conversation_ids: Sequence[int]) -> dict[int, Heads]:
    rows = connection.execute(statements.HEADS, {"conversation_ids": conversation_ids})
    return {
        row.id: Heads(row.last_seq, row.low_seq, row.members_version, row.removed_version, row.mark)
        for row in rows
    }


def standings(connection: Connection, user_ids: Sequence[int]) -> dict[int, Standing]:
    rows = connection.execute(statements.STANDINGS, {"user_ids": user_ids})
    return {row.user_id: Standing(row.valid_after, row.banned_until) for row in rows}


def conversations_of(connection: Connection, user_id: int, most: int) -> list[int]:
    """The user's conversations, the most recently active first."""
    return list(connection.scalars(statements.CONVERSATIONS_OF_USER, {"user_id": user_id, "most": most}))
