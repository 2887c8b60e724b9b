"""Retention: removes old messages in small transactions, by age and by number per conversation.

It first removes the log up to the creation of the newest message that will go, and raises
`low_seq` to that place: a client that comes back with a cursor below it starts over. Then it
removes the messages, the oldest first.

Later changes of a removed message (an edit, a reaction) stay in the log, so that a client
that was away for a minute need not start over because somebody reacted to an old message. A
row of `chat_removed_messages` takes the place of the message until `low_seq` has passed
those changes. So at every moment each change above `low_seq` has its message or such a row.
The change at `low_seq` itself stays in the log, because its mark proves that a cursor there
belongs to this history. `chat_client_ids` keeps the idempotency keys of removed messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import trio
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import ColumnElement, Connection, Engine, Table, delete, func, or_, select, text, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import Unavailable
from chatd.core.model import now, timestamp
from chatd.store import schema
from chatd.store.engine import is_sqlite
from chatd.store.upkeep.scans import looking

BATCH = 1000  # rows per transaction: a few milliseconds, in which SQLite lets nobody else write
# Seconds that the queues keep rows which nothing takes any more, after Redis or webhooks were turned off.
LEFT_FOR = 7 * 24 * 3600.0
PAUSE = 0.02  # seconds between two transactions, in which other writers can work
_ADVISORY_LOCK = 0x7072756E  # lets one node at a time do this; the number is arbitrary

T = TypeVar("T")

_messages, _changes, _heads = schema.messages.c, schema.changes.c, schema.conversations.c


class Rules(Struct, frozen=True):
    """What to keep: messages younger than `days`, the newest `messages` of each conversation; 0: no limit."""

    days: float = 0.0
    messages: int = 0

    def __bool__(self) -> bool:
        return bool(self.days or self.messages)


class _Marks(Struct, frozen=True):
    """The messages of a conversation to remove: ids below `beyond`; and ids below `old` if older than `moment`.

    Ids grow with time, but the clock may have been wrong for a while. The check of `moment` keeps younger
    messages in that case.
    """

    beyond: int = 0
    old: int = 0
    moment: str = ""

    @property
    def below(self) -> int:
        return max(self.beyond, self.old)

    def messages(self, conversation_id: int) -> ColumnElement[bool]:
        mine = (_messages.chat_conversation_id == conversation_id) & (_messages.id < self.below)
        if self.old <= self.beyond:
            return mine
        return mine & or_(_messages.id < self.beyond, _messages.created_at < self.moment)


@dataclass
class _Target:
    """A conversation, and the place `low` up to which its log is removed.

    `last_changes`: message id → seq of its last change, for messages with changes after `low`. That is known
    for the log up to `checked`.
    """

    conversation_id: int
    marks: _Marks
    low: int = 0
    checked: int = 0
    last_changes: dict[int, int] = field(default_factory=dict)


class Pruner:
    """Applies the rules once: call `find` once, then `step` until it returns None.

    Both block, so use a thread.
    """

    def __init__(self, engine: Engine, rules: Rules, *, patient: bool = False) -> None:
        """`patient`: if another node is pruning, wait for it instead of leaving the work to it."""
        self._engine, self._rules, self._patient = engine, rules, patient
        self._targets: deque[_Target] = deque()

    def find(self) -> int:
        """Find the messages to remove, and return their number. Writes nothing and holds no locks."""
        with looking(self._engine) as connection:
            found = _marks(connection, self._rules)
            self._targets = deque(_target(connection, id, marks) for id, marks in sorted(found.items()))
            return sum(_count(connection, target) for target in self._targets)

    def step(self) -> int | None:
        """Run one transaction and return the number of messages it removed; None: finished,
        or another node prunes.
        """
        while self._targets:
            with self._engine.begin() as connection:
                if not _alone(connection, self._patient):
                    return None
                removed = _prune(connection, self._targets[0])
            if removed is not None:
                return removed
            self._targets.popleft()
        return None


def remove_leftovers(engine: Engine) -> int:
    """Remove up to `BATCH` old rows from the outbox and from the given-up webhooks; returns their number.

    Blocks.
    """
    before = timestamp(datetime.now(UTC) - timedelta(seconds=LEFT_FOR))
    outbox, webhooks = schema.outbox, schema.webhooks
    old = select(outbox.c.id).where(outbox.c.created_at < before)
    given_up = select(webhooks.c.id).where(webhooks.c.dead == true(), webhooks.c.due_at < before)
    with engine.begin() as connection:
        return sum(
            connection.execute(delete(table).where(table.c.id.in_(found.limit(BATCH)))).rowcount
            for table, found in ((outbox, old), (webhooks, given_up))
        )


class Pruning:
    """Runs a `Pruner` in a thread, for the daemon.

    A cancelled `step` still completes: it takes milliseconds.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)

    async def find(self, rules: Rules) -> Pruner:
        """A pruner that has found its messages. Raises Unavailable."""
        pruner = Pruner(self._engine, rules)
        await self._in_thread(pruner.find, give_up=True)
        return pruner

    async def step(self, pruner: Pruner) -> int | None:
        """See `Pruner.step`. Raises Unavailable."""
        return await self._in_thread(pruner.step, give_up=False)

    async def remove_leftovers(self) -> int:
        """See the function `remove_leftovers`. Raises Unavailable."""
        return await self._in_thread(partial(remove_leftovers, self._engine), give_up=False)

    async def _in_thread(self, work: Callable[[], T], *, give_up: bool) -> T:
        try:
            return await trio.to_thread.run_sync(work, limiter=self._thread, abandon_on_cancel=give_up)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable() from error


def _marks(connection: Connection, rules: Rules) -> dict[int, _Marks]:
    """conversation_id → the messages to remove there."""
    found: dict[int, _Marks] = {}
    if rules.days:
        moment = timestamp(datetime.now(UTC) - timedelta(days=rules.days))
        below = _first_younger(connection, moment)
        old = select(_messages.chat_conversation_id).where(_messages.id < below).distinct()
        found = dict.fromkeys(connection.scalars(old), _Marks(old=below, moment=moment))
    for conversation_id, beyond in _beyond(connection, rules.messages) if rules.messages else ():
        found[conversation_id] = replace(found.get(conversation_id, _Marks()), beyond=beyond)
    return found


def _first_younger(connection: Connection, moment: str) -> int:
    """The lowest id of a message not older than `moment`. Ids grow with time, so this is a binary search."""
    low = 1
    high = (connection.scalar(select(func.max(_messages.id))) or 0) + 1
    while low < high:
        middle = (low + high) // 2
        query = select(_messages.id, _messages.created_at).where(_messages.id >= middle)
        row = connection.execute(query.order_by(_messages.id).limit(1)).first()
        if row is not None and row.id < high and row.created_at < moment:
            low = row.id + 1
        else:
            high = middle
    return low


def _beyond(connection: Connection, most: int) -> Iterator[tuple[int, int]]:
    """(conversation_id, lowest id among its newest `most` messages), for conversations that have more."""
    for conversation_id in connection.scalars(select(_heads.id).where(_heads.last_seq > most)).all():
        newest = select(_messages.id).where(_messages.chat_conversation_id == conversation_id)
        beyond = connection.scalar(newest.order_by(_messages.id.desc()).offset(most).limit(1))
        if beyond is not None:
            yield conversation_id, beyond + 1


def _target(connection: Connection, conversation_id: int, marks: _Marks) -> _Target:
    last = connection.scalar(select(_heads.last_seq).where(_heads.id == conversation_id)) or 0
    newest = connection.scalar(select(func.max(_messages.seq)).where(marks.messages(conversation_id)))
    target = _Target(conversation_id, marks, low=newest or 0, checked=newest or 0)
    _look_at_log(connection, target, last)
    return target


def _look_at_log(connection: Connection, target: _Target, last_seq: int) -> None:
    """Read the part of the log after `checked` for the last changes of messages that will go."""
    mine = (_changes.conversation_id == target.conversation_id) & (_changes.seq > target.checked)
    theirs = _changes.message_id < target.marks.below
    last = select(_changes.message_id, func.max(_changes.seq)).where(mine, theirs).group_by(_changes.message_id)
    target.last_changes.update((id, seq) for id, seq in connection.execute(last))
    target.checked = last_seq


def _count(connection: Connection, target: _Target) -> int:
    mine = target.marks.messages(target.conversation_id)
    return connection.scalar(select(func.count()).select_from(schema.messages).where(mine)) or 0


def _alone(connection: Connection, patient: bool) -> bool:
    if is_sqlite(connection.engine):
        return True
    if patient:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
        return True
    return bool(connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({_ADVISORY_LOCK})")))


def _prune(connection: Connection, target: _Target) -> int | None:
    """Remove one batch of the log or of messages; returns the number of messages; None: nothing is left."""
    head = select(_heads.last_seq, _heads.low_seq).where(_heads.id == target.conversation_id)
    row = connection.execute(head.with_for_update()).one()
    if row.last_seq > target.checked:  # perhaps an old message was edited in the meantime
        _look_at_log(connection, target, row.last_seq)
    if target.low > row.low_seq:
        raised = update(schema.conversations).where(_heads.id == target.conversation_id)
        connection.execute(raised.values(low_seq=target.low))
        connection.execute(delete(schema.removed).where(_gone_from_log(target)))
    if _cut_log(connection, target):
        return 0
    return _remove_messages(connection, target)


def _gone_from_log(target: _Target) -> ColumnElement[bool]:
    """Rows of removed messages that have no change left in the log."""
    removed = schema.removed.c
    return (removed.conversation_id == target.conversation_id) & (removed.last_seq <= target.low)


def _cut_log(connection: Connection, target: _Target) -> int:
    mine = _changes.conversation_id == target.conversation_id
    first = connection.scalar(select(func.min(_changes.seq)).where(mine))
    if first is None or first >= target.low:
        return 0
    cut = delete(schema.changes).where(mine, _changes.seq < min(target.low, first + BATCH))
    return connection.execute(cut).rowcount


def _remove_messages(connection: Connection, target: _Target) -> int | None:
    mine = target.marks.messages(target.conversation_id)
    ids = list(connection.scalars(select(_messages.id).where(mine).order_by(_messages.id).limit(BATCH)))
    if not ids:
        return None
    _remember(connection, target, ids)
    connection.execute(delete(schema.reactions).where(schema.reactions.c.message_id.in_(ids)))
    connection.execute(delete(schema.messages).where(_messages.id.in_(ids)))
    return len(ids)


def _remember(connection: Connection, target: _Target, ids: list[int]) -> None:
    """Keep the idempotency keys of these messages, and rows for those with changes left in the log.

    A row may exist already if an older version of chatd, which does not know these tables, ran in between.
    """
    table, conversation = schema.client_ids, _messages.chat_conversation_id.label("conversation_id")
    columns = (
        conversation,
        _messages.user_id,
        _messages.client_id,
        _messages.id.label("message_id"),
        _messages.seq,
    )
    known = select(*columns, _messages.created_at, _messages.request_hash).where(
        _messages.id.in_(ids), _messages.client_id.is_not(None)
    )
    connection.execute(_insert(connection, table).from_select([c.name for c in table.c], known))
    with_changes = select(conversation, _messages.id.label("message_id"), *_of_removed).where(
        _messages.id.in_([id for id in ids if id in target.last_changes])
    )
    rows = [
        {**row, "last_seq": target.last_changes[row["message_id"]], "deleted_at": row["deleted_at"] or now()}
        for row in connection.execute(with_changes).mappings()
    ]
    if rows:
        connection.execute(_insert(connection, schema.removed), rows)


_of_removed = (_messages.user_id, _messages.type, _messages.created_at, _messages.deleted_at)


def _insert(connection: Connection, table: Table) -> Any:
    into = sqlite.insert if is_sqlite(connection.engine) else postgresql.insert
    return into(table).on_conflict_do_nothing()
