"""`among(column, name)`: the column is one of a list of integers, which is one parameter however long it is.

`column IN (…)` has a parameter for each: PostgreSQL takes 65,535 of them, and a room may have more people. The
text of the statement is always the same, too, so that the driver has it prepared.
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
    """An array; in SQLite, which has none, JSON."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(ARRAY(BigInteger()) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Iterable[int] | None, dialect: Dialect) -> Any:
        integers = list(value or ())
        return integers if dialect.name == "postgresql" else msgspec.json.encode(integers).decode()


class _Among(FunctionElement[bool]):
    """Of a column and the integers."""

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> _Among:
        """As it is: SQLAlchemy would write `(…) = 1` for SQLite, which finds no index then."""
        return self


def among(column: Column[Any], name: str) -> ColumnElement[bool]:
    """`name` is that of the parameter."""
    return _Among(column, bindparam(name, type_=_Integers()))


@compiles(_Among)
def _array(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, integers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} = ANY ({integers})"


@compiles(_Among, "sqlite")
def _json(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    column, integers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({integers}))"
