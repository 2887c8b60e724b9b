"""What the database is asked: snapshots for a subscription, pages of history, heads, rights.

Plain functions of a connection, run by `Reader` in threads; each call is one snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec
import structlog
import trio
from msgspec import Struct
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chatd import limits
from chatd.errors import NotFound, Unavailable
from chatd.model import Change, Kind, Message, State
from chatd.protocol import change_payload
from chatd.store import queries
from chatd.store.rows import message

ROOM_BYTES, RECEIPT_BYTES = 200, 50  # what a room and a receipt take of an answer, without messages
DEADLINE = 10.0  # seconds; a read that takes longer is given up, its thread ends when the driver does

T = TypeVar("T")

log = structlog.get_logger()


class Cursor(Struct, frozen=True):
    """How far somebody has read and received a conversation: message ids, 0 for nothing."""

    user_id: int
    read: int
    delivered: int


class Snapshot(Struct, frozen=True):
    """A conversation for one user at one moment, with what was missed since `after`."""

    conversation_id: int
    seq: int
    members_version: int
    recovered: bool
    changes: list[bytes]  # events as JSON, in seq order; the newest messages if not recovered
    has_more: bool
    unread: int
    receipts: list[Cursor]

    @property
    def size(self) -> int:
        """Bytes on the wire, about."""
        return ROOM_BYTES + sum(map(len, self.changes)) + RECEIPT_BYTES * len(self.receipts)


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


class Reader:
    """Runs reads in threads, as many at once as there are connections, so that waiting is cancellable."""

    def __init__(self, engine: Engine, readers: int) -> None:
        self._engine = engine
        self._limiter = trio.CapacityLimiter(readers)

    async def __call__(self, read: Callable[..., T], *arguments: Any) -> T:
        """`read(connection, *arguments)` in one snapshot. Raises Unavailable."""
        with trio.move_on_after(DEADLINE):
            return await trio.to_thread.run_sync(
                self._run, read, arguments, limiter=self._limiter, abandon_on_cancel=True
            )
        raise Unavailable()

    def _run(self, read: Callable[..., T], arguments: tuple[Any, ...], again: bool = True) -> T:
        try:
            with self._engine.connect() as connection:
                return read(connection, *arguments)
        except (DBAPIError, PoolTimeout, OSError) as error:  # the last: no descriptor left to connect with
            # A pooled connection that died while idle says so at its first use; a read can be repeated.
            if again and isinstance(error, DBAPIError) and error.connection_invalidated:
                return self._run(read, arguments, again=False)
            log.warning(
                "read_unavailable", read=read.__name__, error=type(getattr(error, "orig", error)).__name__
            )
            raise Unavailable() from error


def ping(connection: Connection) -> None:
    connection.execute(queries.PING)


def snapshot(
    connection: Connection,
    user_id: int,
    entitled: bool,
    conversation_id: int,
    after: int | None,
    same_epoch: bool,
    members_detail: int,
) -> Snapshot:
    """Raises NotFound where the user may not look. `entitled`: enough unless a row says otherwise."""
    rooms = [(conversation_id, after, entitled)]
    found = snapshots(connection, user_id, rooms, same_epoch, members_detail)[conversation_id]
    if isinstance(found, NotFound):
        raise found
    return found


def snapshots(
    connection: Connection,
    user_id: int,
    rooms: Sequence[tuple[int, int | None, bool]],
    same_epoch: bool,
    members_detail: int,
) -> dict[int, Snapshot | NotFound]:
    """Several conversations, as of one moment; `rooms` are (conversation_id, after, entitled)."""
    if not rooms:
        return {}
    places = _places(connection, user_id, [id for id, _, _ in rooms], members_detail)
    allowed = {id for id, _, entitled in rooms if _may(places[id].state, entitled)}
    receipts = _receipts(connection, user_id, [places[id] for id in allowed], members_detail)
    found: dict[int, Snapshot | NotFound] = {}
    space = limits.READY_BYTES
    for id, after, _ in rooms:
        if id not in allowed:
            found[id] = NotFound(field="conversation_id")
            continue
        one = _snapshot(connection, places[id], after, same_epoch, receipts.get(id, []))
        if one.size > space:
            one = _reduced(one, user_id)
        found[id] = one
        space -= one.size
    return found


def login(
    connection: Connection, user_id: int, *snapshot_of: Any
) -> tuple[Standing | None, dict[int, Snapshot | NotFound]]:
    """What is held against the user, and `snapshots`: one look for a client that comes back."""
    return standings(connection, [user_id]).get(user_id), snapshots(connection, user_id, *snapshot_of)


class _Place(Struct, frozen=True):
    """A row of `ROOMS`. The defaults are those of a room that nobody has written to yet."""

    id: int
    state: State | None = None
    last_seq: int = 0
    low_seq: int = 0
    members_version: int = 0
    read_id: int = 0
    delivered_id: int = 0
    unread: int = 0
    members: int = 0


def _places(
    connection: Connection, user_id: int, conversation_ids: Sequence[int], members_detail: int
) -> dict[int, _Place]:
    asked = {
        "user_id": user_id,
        "conversation_ids": conversation_ids,
        "most": limits.UNREAD_MAX,
        "members_detail": members_detail,
    }
    found = {
        id: _Place(id, State(state) if state else None, *rest)
        for id, state, *rest in connection.execute(queries.ROOMS, asked)
    }
    # A backend may have written who is banned from a room before there is one.
    if new := [id for id in conversation_ids if id not in found]:
        asked = {"user_id": user_id, "conversation_ids": new}
        states = {id: State(state) for id, state in connection.execute(queries.STATES_OF_USER, asked)}
        found |= {id: _Place(id, states.get(id)) for id in new}
    return found


def _snapshot(
    connection: Connection, room: _Place, after: int | None, same_epoch: bool, receipts: list[Cursor]
) -> Snapshot:
    changes, recovered, has_more = _missed(connection, room.id, after, room.last_seq, room.low_seq, same_epoch)
    return Snapshot(
        conversation_id=room.id,
        seq=room.last_seq,
        members_version=room.members_version,
        recovered=recovered,
        changes=changes,
        has_more=has_more,
        unread=room.unread,
        receipts=receipts,
    )


def _reduced(snapshot: Snapshot, user_id: int) -> Snapshot:
    """What is left of a snapshot that does not fit into an answer: no messages, and nobody else's receipts."""
    return msgspec.structs.replace(
        snapshot,
        recovered=snapshot.recovered and not snapshot.changes,
        changes=[],
        has_more=bool(snapshot.changes) or snapshot.has_more,
        receipts=[cursor for cursor in snapshot.receipts if cursor.user_id == user_id],
    )


def _missed(
    connection: Connection, conversation_id: int, after: int | None, head: int, low: int, same_epoch: bool
) -> tuple[list[bytes], bool, bool]:
    """(changes, recovered, has_more)"""
    if after is None or (same_epoch and after == head):
        return [], True, False
    if same_epoch and low <= after <= head and head - after <= limits.REPLAY_CHANGES:
        changes, complete = changes_after(connection, conversation_id, after)
        if complete:
            return [change.payload for change in changes], True, False
    page = history(connection, conversation_id, None, None, limits.FALLBACK_MESSAGES)
    newest = [change_payload(Kind.CREATED, m.seq, m) for m in page.messages]
    return newest, False, page.has_more


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
    if not _may(states(connection, conversation_id, [user_id]).get(user_id), entitled):
        raise NotFound(field="conversation_id")


def _may(state: State | None, entitled: bool) -> bool:
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


def _receipts(
    connection: Connection, user_id: int, rooms: Iterable[_Place], members_detail: int
) -> dict[int, list[Cursor]]:
    """By conversation. In a crowded one only the user's own: those of all would be most of the answer."""
    found: dict[int, list[Cursor]] = {}
    quiet = []
    for room in rooms:
        if not members_detail or room.members <= members_detail:
            quiet.append(room.id)
        elif room.read_id or room.delivered_id:
            found[room.id] = [Cursor(user_id, room.read_id, room.delivered_id)]
    for id, *cursor in connection.execute(queries.CURSORS, {"conversation_ids": quiet}) if quiet else ():
        found.setdefault(id, []).append(Cursor(*cursor))
    return found
