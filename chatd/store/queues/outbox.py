"""Committed groups that the bus may not have taken: read them, pass them on, remove them.

A row lives from its commit until Redis has it. What an outage or a crash left behind is relayed from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import trio
from msgspec import Struct
from sqlalchemy import Connection, Engine, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from chatd.core.errors import Unavailable
from chatd.core.model import timestamp
from chatd.store import schema
from chatd.store.engine import is_sqlite

FOREIGN_AGE = 30.0  # seconds after which a row's own node is taken to be dead
EXPIRY = 24 * 3600.0  # seconds after which a row helps nobody any more: listeners read the database
RELAY_ROWS = 50  # groups in one go, and
RELAY_BYTES = 4 * 1024 * 1024  # no more than so many, unless it is one


class Left(Struct, frozen=True):
    """A committed group that is still in the outbox. `payloads` are its events as JSON."""

    id: int
    node: str
    payloads: list[bytes]


Publish = Callable[[Left], None]


class Settled:
    """Ids of rows that the bus has taken. The bus adds to them, the writer removes the rows with its next
    commit.
    """

    def __init__(self) -> None:
        self._ids: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(self, ids: Iterable[int]) -> None:
        self._ids.update(ids)

    def take(self) -> set[int]:
        taken, self._ids = self._ids, set()
        return taken


class Outbox:
    def __init__(self, engine: Engine) -> None:
        self.settled = Settled()
        self._engine = engine
        self._thread = trio.CapacityLimiter(1)

    async def relay(self, publish: Publish, *, node: str, above: int = 0) -> tuple[int, int]:
        """Pass on this node's own rows above an id, and any node's that are old enough.

        `publish` runs in the thread, row by row; where it raises, this row and those after it stay where they
        are. Returns how many rows were passed on and the highest id among this node's own.
        """
        return await trio.to_thread.run_sync(self._relay, publish, node, above, limiter=self._thread)

    def settle(self, ids: Iterable[int]) -> None:
        """The bus has taken these groups: their rows go with a later commit."""
        self.settled.add(ids)

    async def expire(self) -> int:
        """Remove what is too old to be of use; returns how many groups that were."""
        return await trio.to_thread.run_sync(self._expire, limiter=self._thread)

    async def backlog(self) -> tuple[int, float]:
        """How many groups are left, of all nodes, and the age of the oldest in seconds. Raises Unavailable."""
        return await trio.to_thread.run_sync(self._backlog, limiter=self._thread)

    def _backlog(self) -> tuple[int, float]:
        query = select(func.count(), func.min(schema.outbox.c.created_at)).select_from(schema.outbox)
        try:
            with self._engine.connect() as connection:
                count, oldest = connection.execute(query).one()
        except SQLAlchemyError as error:
            raise Unavailable() from error
        age = datetime.now(UTC) - datetime.fromisoformat(oldest) if oldest else timedelta()
        return count, age.total_seconds()

    def _relay(self, publish: Publish, node: str, above: int) -> tuple[int, int]:
        done: list[Left] = []
        failure: Exception | None = None
        try:
            with self._claimed(node, above, done) as rows:
                try:
                    for row in rows:
                        publish(row)
                        done.append(row)
                except Exception as error:  # those before it shall not be published again
                    failure = error
        except (SQLAlchemyError, OSError) as error:  # the last: no descriptor left to connect with
            raise Unavailable() from error
        if failure is not None:
            raise failure
        return len(done), max((row.id for row in done if row.node == node), default=above)

    @contextmanager
    def _claimed(self, node: str, above: int, done: list[Left]) -> Iterator[list[Left]]:
        """The next rows. When the block ends, `done` are removed.

        PostgreSQL locks them meanwhile, so that two nodes do not relay the same. SQLite has one lock for
        everything, which must not be held while Redis is waited for.
        """
        if is_sqlite(self._engine):
            with self._engine.begin() as connection:
                rows = _next(connection, node, above)
            yield rows
            with self._engine.begin() as connection:
                _remove(connection, done)
        else:
            with self._engine.begin() as connection:
                rows = _next(connection, node, above)
                yield rows
                _remove(connection, done)

    def _expire(self) -> int:
        try:
            with self._engine.begin() as connection:
                old = delete(schema.outbox).where(schema.outbox.c.created_at < _ago(EXPIRY))
                return connection.execute(old).rowcount
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable() from error


def _next(connection: Connection, node: str, above: int) -> list[Left]:
    """A node's own rows above an id, and any node's that are old enough: what nobody else is relaying."""
    table = schema.outbox
    own = (table.c.node == node) & (table.c.id > above)
    sizes = (
        select(table.c.id, func.length(table.c.payloads).label("size"))
        .where(own | (table.c.created_at < _ago(FOREIGN_AGE)))
        .order_by(table.c.id)
        .limit(RELAY_ROWS)
        .with_for_update(skip_locked=True)
    )
    ids: list[int] = []
    space = RELAY_BYTES
    for row in connection.execute(sizes).all():
        space -= row.size
        if space < 0 and ids:
            break
        ids.append(row.id)
    rows = connection.execute(select(table).where(table.c.id.in_(ids)).order_by(table.c.id))
    return [Left(row.id, row.node, row.payloads.split(b"\n")) for row in rows]


def _remove(connection: Connection, rows: Sequence[Left]) -> None:
    if rows:
        connection.execute(delete(schema.outbox).where(schema.outbox.c.id.in_([row.id for row in rows])))


def _ago(seconds: float) -> str:
    return timestamp(datetime.now(UTC) - timedelta(seconds=seconds))
