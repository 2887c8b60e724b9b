"""`among(column, name)`: an SQL condition that `column` is in a list of integers, which is a single parameter.

`column IN (…)` has one parameter per integer. PostgreSQL allows 65,535 parameters, and a room may have more
members. With a single parameter the statement's text is always the same, so the driver can prepare it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Column, Dialect, Text, bindparam
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement, FunctionElement
from sqlalchemy.types import Boolean, TypeDecorator, TypeEngine


class _Integers(TypeDecorator[Iterable[int]]):
    """A list of integers: an array for PostgreSQL, JSON text for SQLite, which has no arrays."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(ARRAY(BigInteger()) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Iterable[int] | None, dialect: Dialect) -> Any:
        integers = list(value or ())
        return integers if dialect.name == "postgresql" else msgspec.json.encode(integers).decode()


class _Among(FunctionElement[bool]):
    """The SQL expression; its clauses are the column and the parameter."""

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> _Among:
        """Keep SQLAlchemy from writing `(…) = 1` for SQLite, which would not use an index then."""
        return self


def among(column: Column[Any], name: str) -> ColumnElement[bool]:
    """The condition. `name` is the name of the parameter that takes the integers."""
    return _Among(column, bindparam(name, type_=_Integers()))


@compiles(_Among)
def _array(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, integers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} = ANY ({integers})"


@compiles(_Among, "sqlite")
def _json(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, integers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({integers}))"
