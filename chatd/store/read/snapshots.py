"""Snapshots of conversations for a client that enters them: rights, head, missed changes, receipts.

These are plain functions of a connection, which `Reader` runs in threads. Several requests share one snapshot
of the database and need no more queries than a single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct
from sqlalchemy import Connection

from chatd.core import limits
from chatd.core.errors import NotFound
from chatd.core.model import Change, Kind, Position, State
from chatd.core.protocol import change_payload
from chatd.store import keys
from chatd.store.read import statements
from chatd.store.read.lookups import (
    Heads,
    Marks,
    Page,
    Standing,
    changes_after,
    epoch_of,
    history,
    is_of,
    marks_of,
    may,
    standings,
)

ROOM_BYTES, RECEIPT_BYTES = 200, 50  # approximate JSON size of a room without messages, and of a receipt
KEPT_LOGS = 20  # rooms whose logs are cached during one read: 5 MiB at most


class Entry(Struct, frozen=True):
    """A user's request to enter rooms, each as (conversation_id, position, entitled).

    `entitled`: the user may enter unless a members' row says otherwise. `epoch`: the client's epoch, for
    positions without a mark; None: the client did not send one. `brief`: include at most `ANSWER_BYTES` of
    changes for all rooms together, and leave the others for a later read. `portion`: the user has a live
    subscription that lags behind, so read the missed changes in portions.
    """

    user_id: int
    rooms: Sequence[tuple[int, Position, bool]]
    epoch: str | None
    members_detail: int
    brief: bool = False
    portion: bool = False


class Cursor(Struct, frozen=True):
    """How far a user has read and received a conversation, as message ids; 0: nothing."""

    user_id: int
    read: int
    delivered: int


class Snapshot(Struct, frozen=True):
    """A conversation for one user, with the changes since the client's position.

    `mark` is the mark of the change `seq`. `same`: the position belongs to the present history of the database,
    whose name is `epoch`. `recovered`: `changes` are all that the client has missed, up to `seq`. `later`:
    there is more to read; a portion ends at `seq`, and any other snapshot has no missed changes at all.
    """

    conversation_id: int
    seq: int
    epoch: str
    mark: str | None
    same: bool
    members_version: int
    recovered: bool
    changes: Sequence[Change]  # in seq order; the newest messages if not recovered
    has_more: bool
    unread: int
    receipts: list[Cursor]
    later: bool = False
    member: bool = True  # False if the user has no row in `chat_members`

    @property
    def size(self) -> int:
        """Approximate bytes of JSON without the changes."""
        return ROOM_BYTES + RECEIPT_BYTES * len(self.receipts)


Found = dict[int, Snapshot | NotFound]


class Entered(Struct, frozen=True):
    """The user's restrictions (None: there are none) and the rooms, from one snapshot of history `epoch`."""

    standing: Standing | None
    epoch: str
    rooms: Found


def logins(connection: Connection, entries: Sequence[Entry]) -> list[Entered]:
    """The answers to logins, in the order of `entries`."""
    standing = standings(connection, list({entry.user_id for entry in entries}))
    epoch = epoch_of(connection)
    found = snapshots(connection, entries)
    return [Entered(standing.get(one.user_id), epoch, rooms) for one, rooms in zip(entries, found, strict=True)]


def snapshots(connection: Connection, entries: Sequence[Entry]) -> list[Found]:
    """For each entry, its rooms: a snapshot, or NotFound if the user may not enter."""
    conversations = _conversations(connection, entries)
    allowed = [
        [
            conversations[number, id]
            for id, _, entitled in entry.rooms
            if may(conversations[number, id].state, entitled)
        ]
        for number, entry in enumerate(entries)
    ]
    cursors = _cursors(connection, {row.id for mine in allowed for row in mine if row.quiet})
    marks = marks_of(connection, list(_changes_to_prove(entries, conversations)))
    missed = _Missed(connection, epoch_of(connection), marks)
    return [
        _of_entry(entry, {row.id: row for row in mine}, cursors, missed)
        for entry, mine in zip(entries, allowed, strict=True)
    ]


class _Conversation(Struct, frozen=True):
    """A row of `ROOMS`. `quiet`: the room has few enough members to show all receipts."""

    id: int
    state: State | None
    quiet: bool
    last_seq: int
    low_seq: int
    mark: str | None
    members_version: int
    read_id: int
    delivered_id: int
    unread: int


Cursors = dict[int, list[Cursor]]
Conversations = dict[tuple[int, int], _Conversation]


def _conversations(connection: Connection, entries: Sequence[Entry]) -> Conversations:
    """(number of the entry, conversation_id) → conversation."""
    wanted = [(number, entry.user_id, id) for number, entry in enumerate(entries) for id, _, _ in entry.rooms]
    if not wanted:
        return {}
    detail = entries[0].members_detail  # a setting: the same for all
    asked = keys.as_parameter(wanted) | {"most": limits.UNREAD_MAX, "members_detail": detail}
    rows = connection.execute(statements.ROOMS[connection.dialect.name], asked)
    return {(number, id): _conversation(id, detail, *rest) for number, id, *rest in rows}


def _changes_to_prove(entries: Sequence[Entry], conversations: Conversations) -> Iterator[tuple[int, int]]:
    """The changes, as (conversation_id, seq), whose marks `is_same` needs. The last change's mark is known."""
    for number, entry in enumerate(entries):
        for id, position, _ in entry.rooms:
            row, after = conversations[number, id], position.after
            if after and position.mark is not UNSET and row.low_seq <= after < row.last_seq:
                yield id, after


def _conversation(id: int, detail: int, state: str | None, members: int, *rest: Any) -> _Conversation:
    quiet = not detail or members <= detail
    return _Conversation(id, State(state) if state else None, quiet, *rest)


def _cursors(connection: Connection, conversation_ids: set[int]) -> Cursors:
    found: Cursors = {}
    asked = {"conversation_ids": list(conversation_ids)}
    for id, *cursor in connection.execute(statements.CURSORS, asked) if conversation_ids else ():
        found.setdefault(id, []).append(Cursor(*cursor))
    return found


def _of_entry(entry: Entry, allowed: dict[int, _Conversation], cursors: Cursors, missed: _Missed) -> Found:
    found: Found = {}
    space = limits.READY_BYTES
    for_changes = limits.ANSWER_BYTES
    for id, position, _ in entry.rooms:
        row = allowed.get(id)
        if row is None:
            found[id] = NotFound(field="conversation_id")
            continue
        one = _snapshot(entry, row, position, cursors, missed, for_changes)
        if one.size > space:
            one = _reduced(one, entry.user_id)
        found[id] = one
        space -= one.size
        for_changes -= _bytes(one.changes)
    return found


def _snapshot(
    entry: Entry, row: _Conversation, position: Position, cursors: Cursors, missed: _Missed, space: int
) -> Snapshot:
    same = missed.is_same(row, position, entry.epoch)
    if entry.portion:
        found = missed.portion(row, position.after, same)
    else:
        found = missed.of(row, position.after, same, space if entry.brief else None)
    last = found.changes[-1] if found.later and found.changes else None
    return Snapshot(
        conversation_id=row.id,
        seq=last.seq if last else row.last_seq,
        epoch=missed.epoch,
        mark=last.mark if last else row.mark,
        same=same,
        members_version=row.members_version,
        recovered=found.recovered,
        changes=found.changes,
        has_more=found.has_more,
        later=found.later,
        unread=row.unread,
        receipts=cursors.get(row.id, []) if row.quiet else list(_own_cursor(entry.user_id, row)),
        member=row.state is not None,
    )


def _own_cursor(user_id: int, row: _Conversation) -> Iterable[Cursor]:
    """The user's own cursor, for a crowded room, in which all receipts would be most of the answer."""
    if row.read_id or row.delivered_id:
        yield Cursor(user_id, row.read_id, row.delivered_id)


def _reduced(snapshot: Snapshot, user_id: int) -> Snapshot:
    """A snapshot without the receipts of others, for an answer that has no space for them."""
    own = [cursor for cursor in snapshot.receipts if cursor.user_id == user_id]
    return msgspec.structs.replace(snapshot, receipts=own)


def _bytes(changes: Sequence[Change]) -> int:
    return sum(len(change.payload) for change in changes)


class _Found(Struct, frozen=True):
    """The missed changes; the fields are those of `Snapshot`."""

    changes: Sequence[Change] = []
    recovered: bool = True
    has_more: bool = False
    later: bool = False


class _Missed:
    """Reads missed changes. Clients that come back to a room with the same position share one read."""

    def __init__(self, connection: Connection, epoch: str, marks: Marks) -> None:
        self.epoch = epoch
        self._connection, self._marks = connection, marks
        self._logs: dict[tuple[int, int, int], tuple[list[Change], bool]] = {}
        self._pages: dict[int, Page] = {}

    def is_same(self, row: _Conversation, position: Position, epoch: str | None) -> bool:
        """Whether a position belongs to the present history. Its mark decides; without a mark the epoch does.

        A mark from before `low_seq` cannot be checked; there it does not matter, because `of` starts over.
        """
        if position.after is None:
            return True
        if position.mark is UNSET:
            return epoch in (None, self.epoch) and position.after <= row.last_seq
        if position.after < row.low_seq:
            return True
        heads = Heads(row.last_seq, row.low_seq, row.members_version, mark=row.mark)
        return is_of(row.id, position.after, position.mark, heads, self._marks)

    def of(self, row: _Conversation, after: int | None, same: bool, space: int | None) -> _Found:
        """The changes after a position: all of them if `space` is None, else those that fit into `space` bytes.

        Instead, the newest messages if the position is not in this history, or too many changes follow it.
        """
        head = row.last_seq
        if after is None or (same and after == head):
            return _Found()
        if same and row.low_seq <= after <= head and head - after <= limits.REPLAY_CHANGES:
            changes, complete = self._log(row.id, after, space)
            if complete:
                return _Found(changes)
            if space is not None:
                return _Found(later=True)
        return self._newest_within(row.id, limits.ANSWER_BYTES if space is None else space)

    def portion(self, row: _Conversation, after: int | None, same: bool) -> _Found:
        """The next portion of the missed changes; what `of` returns if the client has missed too much."""
        head = row.last_seq
        if after is not None and same and row.low_seq <= after < head <= after + limits.BEHIND_CHANGES:
            changes, complete = self._read_log(row.id, after, limits.PORTION_BYTES)
            if complete or changes:
                return _Found(changes, later=not complete)
        return self.of(row, after, same, None)

    def _log(self, conversation_id: int, after: int, space: int | None) -> tuple[Sequence[Change], bool]:
        if space is None:
            return self._read_log(conversation_id, after, limits.REPLAY_BYTES)
        if space <= 0:
            return (), False
        changes, complete = self._read_log(conversation_id, after, limits.ANSWER_BYTES)
        return changes, complete and _bytes(changes) <= space

    def _read_log(self, conversation_id: int, after: int, most: int) -> tuple[list[Change], bool]:
        key = (conversation_id, after, most)
        if key not in self._logs:
            if len(self._logs) >= KEPT_LOGS:
                self._logs.clear()
            self._logs[key] = changes_after(self._connection, conversation_id, after, most)
        return self._logs[key]

    def _newest_within(self, conversation_id: int, space: int) -> _Found:
        """The newest messages that fit into `space` bytes."""
        page = self._newest(conversation_id)
        kind = Kind.CREATED
        changes = [Change(conversation_id, m.seq, kind, change_payload(kind, m.seq, m)) for m in page.messages]
        fitting = newest(changes, space)
        return _Found(fitting, recovered=False, has_more=page.has_more or len(fitting) < len(changes))

    def _newest(self, conversation_id: int) -> Page:
        if conversation_id not in self._pages:
            if len(self._pages) >= KEPT_LOGS:
                self._pages.clear()
            page = history(
                self._connection, conversation_id, None, None, limits.FALLBACK_MESSAGES, limits.ANSWER_BYTES
            )
            self._pages[conversation_id] = page
        return self._pages[conversation_id]


def newest(changes: Sequence[Change], space: int) -> Sequence[Change]:
    """The last changes that fit into `space` bytes."""
    start = len(changes)
    while start and (space := space - len(changes[start - 1].payload) - 1) >= 0:
        start -= 1
    return changes[start:]
