"""Reads whole tables with the writing engine, without locks that could block a writer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Column, Connection, Engine, RowMapping, Select, tuple_

from chatd.store.engine import is_sqlite


@contextmanager
def looking(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: one snapshot, no locks, no statement timeout."""
    options: dict[str, Any] = {"only_reads": True}
    if not is_sqlite(engine):
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect().execution_options(**options) as connection:
        if not is_sqlite(engine):
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        yield connection


def pages(
    engine: Engine, query: Select[Any], *key: Column[Any], size: int = 100
) -> Iterator[Sequence[RowMapping]]:
    """The rows of a query, `size` at a time, in the order of a unique `key`, whose columns the query must have.

    Each page is a transaction of its own, so the caller may be slow, or write between two pages.
    """
    last: tuple[Any, ...] | None = None
    while True:
        rest = query if last is None else query.where(tuple_(*key) > tuple_(*last))
        with looking(engine) as connection:
            rows = connection.execute(rest.order_by(*key).limit(size)).mappings().all()
        if rows:
            yield rows
        if len(rows) < size:
            return
        last = tuple(rows[-1][column] for column in key)
