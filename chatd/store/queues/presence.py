"""Who is connected where, as the backend is to know it: leases of nodes, what each has, what was told.

    chat_nodes        a lease per running node. Its node raises `beat`; the others look whether it moves
    chat_present      what each lease has: written by its node alone, removed with the lease
    chat_attendance   per user and room: what the backend was told last, and when to look whether that is true

Every change of `chat_present` puts its key into doubt, in the same transaction. Once a doubt is due, whichever
node comes first holds what was told against what is true, and writes the webhook and what it tells together. So
no event depends on who notices, or on who is still there afterwards.
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

SLICE = 500  # keys in one transaction: some 10 ms, in which SQLite's writer waits
ENDING = -1  # the beat of a lease that is being removed
FAR = 60.0  # seconds: what is due later than that was written by a clock that was ahead
FORGOTTEN = 24 * 3600 * 1000  # ms that the version of what has gone is kept, so that a later one is higher

Key = tuple[int, int]  # place, id: as in chat.presence
# (place, id, present, version) → the event and its body; None for what the backend does not want to hear.
Announce = Callable[[int, int, bool, int], tuple[str, bytes] | None]
T = TypeVar("T")


class LeaseLost(Exception):
    """This lease was taken for dead, or the database has gone back in time: begin again with another."""


class Lease(Struct):
    """This node's. `attempted` may have been committed or not, where the answer was lost."""

    name: str
    node: str
    beat: int = 0  # 0: not taken yet
    attempted: int = 0


class Seen(Struct, frozen=True):
    """Another node's lease. `ending`: somebody is removing it."""

    name: str
    node: str
    beat: int

    @property
    def ending(self) -> bool:
        return self.beat == ENDING


class Change(Struct, frozen=True):
    """`due_in`: seconds until it may be told."""

    key: Key
    present: bool
    due_in: int


class Turned(Struct, frozen=True):
    """`told` webhooks were written. `more`: doubts are due that did not fit. `doubts`: some are left at all."""

    others: list[Seen]
    told: int
    more: bool
    doubts: bool


class PresenceTable:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)

    async def turn(self, lease: Lease, changes: Sequence[Change], announce: Announce | None) -> Turned:
        """Renew the lease, write what has changed, tell what is due (not without `announce`), see the others.

        Raises LeaseLost, Unavailable.
        """
        lease.attempted = lease.beat + 1
        turned = await self._in_thread(_turn, lease, changes, announce)
        lease.beat = lease.attempted
        return turned

    async def end(self, name: str, beat: int, due_in: float) -> bool:
        """Remove a part of a lease and what it has. True when nothing is left to do, also where it is alive.

        Raises Unavailable.
        """
        return await self._in_thread(_end, name, beat, due_in)

    async def tidy(self) -> None:
        """Forget who has been gone for long. Raises Unavailable."""
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
    told, more = _settle(connection, clock, announce) if announce is not None else (0, False)
    rows = connection.execute(select(nodes).where(nodes.c.lease != lease.name))
    others = [Seen(row.lease, row.node, row.beat) for row in rows]
    doubts = connection.scalar(_ANY_DOUBT) is not None
    return Turned(others, told, more, doubts)


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
    # The first statement is about all keys, so that their rows are locked in one order: no two nodes wait for
    # each other. Those that are due later are put off by the statements after it.
    for due_in in sorted({change.due_in for change in changes}):
        _doubt(connection, [change.key for change in changes if change.due_in >= due_in], clock(due_in))


def _doubt(connection: Connection, keys: Collection[Key], due_at: str) -> None:
    connection.execute(_DOUBT[connection.dialect.name], as_parameter(keys) | {"due_at": due_at})


def _settle(connection: Connection, clock: Clock, announce: Announce) -> tuple[int, bool]:
    """(how many webhooks were written, whether more doubts are due)"""
    dialect = connection.dialect.name
    due = [*_due(connection, LONG_AGO, clock()), *_due(connection, clock(FAR), FOR_EVER)]
    if not due:
        return 0, False
    keys = [(row.place, row.id) for row in due]
    # After the doubts are locked: who changes one of these keys now waits, and puts it into doubt again.
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
    if told := [row for row in settled if row[3]]:
        connection.execute(_SETTLED[dialect], as_parameter(told))
    if never := [row[:2] for row in settled if not row[3]]:  # it came and went before anything was told
        connection.execute(_FORGET[dialect], as_parameter(never))
    if events:
        at = clock()
        rows = [{"event": e, "body": body, "created_at": at, "due_at": LONG_AGO} for e, body in events]
        connection.execute(insert(webhooks), rows)
    return len(events), len(due) >= SLICE


def _due(connection: Connection, since: str, until: str) -> Sequence[Any]:
    return connection.execute(_DUE, {"since": since, "until": until, "most": SLICE}).all()


def _end(connection: Connection, name: str, beat: int, due_in: float) -> bool:
    """A node that is alive after all has raised its beat, or finds its lease ended and takes another."""
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


# Statements, by the name of the dialect. Each writes its keys in one order: no two nodes wait for each other.

_INTO: dict[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}
_ALWAYS = literal_column("1") == literal_column("1")  # SQLite takes ON CONFLICT for a join's ON without a WHERE
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
    """Debounced: the last change counts."""
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
    # One range at a time: for two of them SQLite would walk over everybody who was ever seen.
    .where(attendance.c.due_at.between(bindparam("since", type_=_MOMENT), bindparam("until", type_=_MOMENT)))
    .order_by(attendance.c.due_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_ANY_DOUBT = select(attendance.c.place).where(attendance.c.due_at.is_not(None)).limit(1)
