"""Keys of several columns as one parameter: a JSON list of lists, which a statement joins with.

The database then looks up each key in an index, and the statement is the same for any number of keys. With
`(a, b) IN (…)` SQLite scans the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    FromClause,
    String,
    Text,
    bindparam,
    cast,
    func,
    text,
)
from sqlalchemy.types import TypeEngine

Kinds = tuple[type[TypeEngine[Any]], ...]

PLACES: Kinds = (BigInteger,)
PAIRS: Kinds = (BigInteger, BigInteger)
INTEGERS: Kinds = (BigInteger, BigInteger, BigInteger)
WITH_TEXT: Kinds = (BigInteger, BigInteger, String)


def listed(dialect: str, kinds: Kinds) -> tuple[FromClause, list[ColumnElement[Any]]]:
    """The table to join with, made of the parameter `keys`, and its columns, of these `kinds`."""
    rows = _SOURCES[dialect]().table_valued("value", name="keys")
    item = _ITEMS[dialect]
    return rows, [item(rows.c.value, place, kind) for place, kind in enumerate(kinds)]


def as_parameter(keys: Iterable[Any]) -> dict[str, str]:
    return {"keys": msgspec.json.encode(list(keys)).decode()}


_SOURCES: dict[str, Callable[[], Any]] = {
    "sqlite": lambda: func.json_each(bindparam("keys")),
    "postgresql": lambda: func.json_array_elements(cast(bindparam("keys", type_=Text), JSON)),
}
_ITEMS: dict[str, Callable[[Any, int, Any], ColumnElement[Any]]] = {
    "sqlite": lambda value, place, kind: func.json_extract(value, text(f"'$[{place}]'"), type_=kind()),
    "postgresql": lambda value, place, kind: cast(value.op("->>")(text(str(place))), kind),
}
