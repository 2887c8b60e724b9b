"""The outbox: committed groups that may not be published on the bus yet. Reads, publishes and removes them.

The commit of a group writes its row, and the row goes when Redis has the group. After an outage or a crash, a
node publishes the rows that are left.
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

FOREIGN_AGE = 30.0  # seconds; an older row's node is probably dead, so any node publishes it
EXPIRY = 24 * 3600.0  # seconds; an older row is useless, because listeners have read the database since
RELAY_ROWS = 50  # most groups published in one turn
RELAY_BYTES = 4 * 1024 * 1024  # most bytes published in one turn, unless a single group is larger


class Left(Struct, frozen=True):
    """A committed group that is still in the outbox. `payloads` are its events as JSON."""

    id: int
    node: str
    payloads: list[bytes]


Publish = Callable[[Left], None]


class Settled:
    """Ids of published rows. The bus adds them, and the writer removes the rows with its next commit."""

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
        """Publish this node's rows above an id, and rows of any node that are older than `FOREIGN_AGE`.

        `publish` runs in a thread, once per row. If it raises, that row and those after it stay. Returns
        (number of rows published, the highest id among this node's own). Raises Unavailable, and whatever
        `publish` raises.
        """
        return await trio.to_thread.run_sync(self._relay, publish, node, above, limiter=self._thread)

    def settle(self, ids: Iterable[int]) -> None:
        """Note that the bus has published these groups: a later commit removes their rows."""
        self.settled.add(ids)

    async def expire(self) -> int:
        """Remove rows older than `EXPIRY`; returns their number. Raises Unavailable."""
        return await trio.to_thread.run_sync(self._expire, limiter=self._thread)

    async def backlog(self) -> tuple[int, float]:
        """(number of rows of all nodes, age of the oldest in seconds). Raises Unavailable."""
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
                except Exception as error:  # raise it later: first remove the rows that were published
                    failure = error
        except (SQLAlchemyError, OSError) as error:  # OSError: no file descriptor left for a connection
            raise Unavailable() from error
        if failure is not None:
            raise failure
        return len(done), max((row.id for row in done if row.node == node), default=above)

    @contextmanager
    def _claimed(self, node: str, above: int, done: list[Left]) -> Iterator[list[Left]]:
        """The next rows. When the block ends, the rows in `done` are removed.

        In PostgreSQL the block holds locks on the rows, so that two nodes do not publish the same ones. SQLite
        has one lock for the whole database, and the block must not hold it while it waits for Redis.
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
    """The rows that `relay` publishes next; without those that another node has locked."""
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
