"""Presence for the backend's webhook: leases of nodes, what each node has, what the backend was told last.

    chat_nodes        one lease per running node. The node raises `beat` as its heartbeat; the others watch it
    chat_present      the users and rooms that each lease has. Only its node adds rows; they go with the lease
    chat_attendance   per user and room: the state last reported to the backend, and when to check it

Every change of `chat_present` marks its key as due for a check (a doubt), in the same transaction. When the
check is due, the first node that comes compares the reported state with the true one, and writes the webhook
and the newly reported state in one transaction. So no event depends on one node that would have to survive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import trio
from msgspec import Struct
from sqlalchemy import (
    Connection,
    Engine,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import Unavailable
from chatd.core.model import FOR_EVER
from chatd.store.clock import LONG_AGO, Clock
from chatd.store.keys import INTEGERS, PAIRS, as_parameter, listed
from chatd.store.schema import attendance, nodes, present, webhooks

SLICE = 500  # keys in one transaction: about 10 ms, during which SQLite's writer has to wait
ENDING = -1  # the beat of a lease that is being removed
FAR = 60.0  # seconds; a check due later than that was written by a clock that was ahead: do it at once
FORGOTTEN = 24 * 3600 * 1000  # ms to keep the version of a user or room that is gone: the next must be higher

Key = tuple[int, int]  # (place, id), see chat.presence
# (place, id, present, version) → the event and its body; None if the backend does not want this event.
Announce = Callable[[int, int, bool, int], tuple[str, bytes] | None]
T = TypeVar("T")


class LeaseLost(Exception):
    """Another node has ended this lease as dead, or the database was restored. The node must take a new one."""


class Lease(Struct):
    """The lease of this node. After a lost answer, the database may hold `beat` or `attempted`."""

    name: str
    node: str
    beat: int = 0  # 0: not taken yet
    attempted: int = 0


class Seen(Struct, frozen=True):
    """The lease of another node. `ending`: a node is removing it."""

    name: str
    node: str
    beat: int

    @property
    def ending(self) -> bool:
        return self.beat == ENDING


class Change(Struct, frozen=True):
    """A user or room has come or gone on this node. `due_in`: seconds until the backend may be told."""

    key: Key
    present: bool
    due_in: int


class Turned(Struct, frozen=True):
    """The result of a turn.

    `others`: the leases of other nodes. `webhooks`: number of events written. `more`: further checks are due
    now. `doubts`: there are checks left, due or not.
    """

    others: list[Seen]
    webhooks: int
    more: bool
    doubts: bool


class PresenceTable:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)

    async def turn(self, lease: Lease, changes: Sequence[Change], announce: Announce | None) -> Turned:
        """Renew the lease, write `changes`, do the checks that are due, and read the other leases.

        Without `announce` it does no checks. Raises LeaseLost, Unavailable.
        """
        lease.attempted = lease.beat + 1
        turned = await self._in_thread(_turn, lease, changes, announce)
        lease.beat = lease.attempted
        return turned

    async def end(self, name: str, beat: int, due_in: float) -> bool:
        """End a lease whose beat stands still, and remove up to `SLICE` of its rows.

        Returns True if nothing is left to do: the lease is gone, or it turns out to be alive. The removed keys
        are checked in `due_in` seconds. Raises Unavailable.
        """
        return await self._in_thread(_end, name, beat, due_in)

    async def tidy(self) -> None:
        """Remove the rows of users and rooms that have been gone for `FORGOTTEN`. Raises Unavailable."""
        await self._in_thread(_tidy)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        def run() -> T:
            try:
                with self._engine.begin() as connection:
                    return work(connection, *arguments)
            except (SQLAlchemyError, OSError) as error:
                raise Unavailable() from error

        return await trio.to_thread.run_sync(run, limiter=self._thread)


def _turn(connection: Connection, lease: Lease, changes: Sequence[Change], announce: Announce | None) -> Turned:
    clock = Clock(connection)
    _beat(connection, lease)
    _write(connection, lease.name, changes, clock)
    written, more = _settle(connection, clock, announce) if announce is not None else (0, False)
    rows = connection.execute(select(nodes).where(nodes.c.lease != lease.name))
    others = [Seen(row.lease, row.node, row.beat) for row in rows]
    doubts = connection.scalar(_ANY_DOUBT) is not None
    return Turned(others, written, more, doubts)


def _beat(connection: Connection, lease: Lease) -> None:
    if not lease.beat:
        into = _INTO[connection.dialect.name](nodes)
        row = {"lease": lease.name, "node": lease.node, "beat": lease.attempted}
        connection.execute(into.on_conflict_do_update(index_elements=[nodes.c.lease], set_=row), row)
        return
    ours = (nodes.c.lease == lease.name) & nodes.c.beat.in_([lease.beat, lease.attempted])
    if not connection.execute(update(nodes).where(ours).values(beat=lease.attempted)).rowcount:
        raise LeaseLost


def _write(connection: Connection, lease: str, changes: Sequence[Change], clock: Clock) -> None:
    dialect = connection.dialect.name
    if there := [change.key for change in changes if change.present]:
        connection.execute(_APPEAR[dialect], as_parameter(there) | {"lease": lease})
    if gone := [change.key for change in changes if not change.present]:
        connection.execute(_VANISH[dialect], as_parameter(gone) | {"lease": lease})
    # The first statement locks the rows of all keys in one order, so two nodes cannot deadlock. The statements
    # after it postpone the keys that are due later.
    for due_in in sorted({change.due_in for change in changes}):
        _doubt(connection, [change.key for change in changes if change.due_in >= due_in], clock(due_in))


def _doubt(connection: Connection, keys: Collection[Key], due_at: str) -> None:
    connection.execute(_DOUBT[connection.dialect.name], as_parameter(keys) | {"due_at": due_at})


def _settle(connection: Connection, clock: Clock, announce: Announce) -> tuple[int, bool]:
    """Do the checks that are due. Returns (webhooks written, whether more checks are due)."""
    dialect = connection.dialect.name
    due = [*_due(connection, LONG_AGO, clock()), *_due(connection, clock(FAR), FOR_EVER)]
    if not due:
        return 0, False
    keys = [(row.place, row.id) for row in due]
    # Read this after the locks on the due rows: a node that changes one of these keys now waits for this
    # transaction, and then makes the key due again.
    true = {(row.place, row.id) for row in connection.execute(_WHO[dialect], as_parameter(keys))}
    events: list[tuple[str, bytes]] = []
    settled: list[tuple[int, int, int, int]] = []
    for place, id, was_there, version in due:
        there = (place, id) in true
        if there is not bool(was_there):
            version = max(clock.milliseconds, version + 1)
            if (event := announce(place, id, there, version)) is not None:
                events.append(event)
        settled.append((place, id, int(there), version))
    if reported := [row for row in settled if row[3]]:
        connection.execute(_SETTLED[dialect], as_parameter(reported))
    # Keys without a version came and went before the backend was told anything.
    if never := [row[:2] for row in settled if not row[3]]:
        connection.execute(_FORGET[dialect], as_parameter(never))
    if events:
        at = clock()
        rows = [{"event": e, "body": body, "created_at": at, "due_at": LONG_AGO} for e, body in events]
        connection.execute(insert(webhooks), rows)
    return len(events), len(due) >= SLICE


def _due(connection: Connection, since: str, until: str) -> Sequence[Any]:
    return connection.execute(_DUE, {"since": since, "until": until, "most": SLICE}).all()


def _end(connection: Connection, name: str, beat: int, due_in: float) -> bool:
    """A node that is alive after all has raised its beat, so nothing matches; or it finds its lease ended."""
    theirs = (nodes.c.lease == name) & nodes.c.beat.in_([beat, ENDING])
    if not connection.execute(update(nodes).where(theirs).values(beat=ENDING)).rowcount:
        return True
    some = select(present.c.place, present.c.id).where(present.c.lease == name).limit(SLICE)
    keys = [(row.place, row.id) for row in connection.execute(some)]
    if keys:
        connection.execute(_VANISH[connection.dialect.name], as_parameter(keys) | {"lease": name})
        _doubt(connection, keys, Clock(connection)(due_in))
    if len(keys) == SLICE:
        return False
    connection.execute(delete(nodes).where(theirs))
    return True


def _tidy(connection: Connection) -> None:
    long_gone = (attendance.c.version < Clock(connection).milliseconds - FORGOTTEN) & ~attendance.c.told
    some = select(attendance.c.place, attendance.c.id).where(long_gone, attendance.c.due_at.is_(None))
    key = tuple_(attendance.c.place, attendance.c.id)
    connection.execute(delete(attendance).where(key.in_(some.limit(10 * SLICE)), long_gone))


# Statements, by dialect. Each writes its keys in the same order, so two nodes cannot deadlock.

_INTO: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
# SQLite needs a WHERE here: without one it parses ON CONFLICT as the ON of a join.
_ALWAYS = literal_column("1") == literal_column("1")
_MOMENT = attendance.c.due_at.type


def _appear(dialect: str) -> Any:
    rows, (place, id) = listed(dialect, PAIRS)
    found = select(place, id, bindparam("lease")).select_from(rows).where(_ALWAYS).order_by(place, id)
    return _INTO[dialect](present).from_select(["place", "id", "lease"], found).on_conflict_do_nothing()


def _vanish(dialect: str) -> Any:
    rows, (place, id) = listed(dialect, PAIRS)
    key = tuple_(present.c.place, present.c.id)
    return delete(present).where(
        present.c.lease == bindparam("lease"), key.in_(select(place, id).select_from(rows))
    )


def _forgetting(dialect: str) -> Any:
    rows, (place, id) = listed(dialect, PAIRS)
    key = tuple_(attendance.c.place, attendance.c.id)
    return delete(attendance).where(key.in_(select(place, id).select_from(rows)))


def _doubting(dialect: str) -> Any:
    """Make keys due. A later change of the same key postpones its check (debounce)."""
    rows, (place, id) = listed(dialect, PAIRS)
    due_at = bindparam("due_at", type_=_MOMENT)
    found = select(place, id, due_at).select_from(rows).where(_ALWAYS).order_by(place, id)
    into = _INTO[dialect](attendance).from_select(["place", "id", "due_at"], found)
    latest = func.max if dialect == "sqlite" else func.greatest
    later = latest(func.coalesce(attendance.c.due_at, into.excluded.due_at), into.excluded.due_at)
    return into.on_conflict_do_update(index_elements=["place", "id"], set_={"due_at": later})


def _who(dialect: str) -> Any:
    rows, (place, id) = listed(dialect, PAIRS)
    here = (present.c.place == place) & (present.c.id == id)
    return select(present.c.place, present.c.id).select_from(rows.join(present, here)).distinct()


def _settling(dialect: str) -> Any:
    rows, (place, id, told, version) = listed(dialect, (*INTEGERS, INTEGERS[0]))
    found = select(place, id, told == 1, version).select_from(rows).where(_ALWAYS)
    into = _INTO[dialect](attendance).from_select(["place", "id", "told", "version"], found)
    fresh = {"told": into.excluded.told, "version": into.excluded.version, "due_at": None}
    return into.on_conflict_do_update(index_elements=["place", "id"], set_=fresh)


_APPEAR, _VANISH, _DOUBT, _WHO, _SETTLED, _FORGET = (
    {dialect: make(dialect) for dialect in _INTO}
    for make in (_appear, _vanish, _doubting, _who, _settling, _forgetting)
)
_DUE = (
    select(attendance.c.place, attendance.c.id, attendance.c.told, attendance.c.version)
    # One range per query: with two ranges SQLite would scan the whole table.
    .where(attendance.c.due_at.between(bindparam("since", type_=_MOMENT), bindparam("until", type_=_MOMENT)))
    .order_by(attendance.c.due_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_ANY_DOUBT = select(attendance.c.place).where(attendance.c.due_at.is_not(None)).limit(1)
