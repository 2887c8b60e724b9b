"""Reads what PHP and forms write as what is meant: "5" as 5, "" as null, [] as {}.

The rules are Laravel's: `integer`, `boolean`, and the middleware that turns empty text into null. This code
runs only after the strict decoder has refused a body, so strict JSON costs nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import Raw, Struct

from chatd.core.ids import integer_of, is_php_list

_TRUTH = {"1": True, "true": True, "0": False, "false": False, 1: True, 0: False}
_NEVER_NULL = frozenset(["content"])  # an edit without it keeps the old content; an empty one is a mistake
_ALSO_INTEGERS = frozenset(["client_id"])  # backends often send the number of a row as this text
_LEFT_OUT = object()


class _Field(Struct, frozen=True):
    name: str
    kinds: frozenset[Any]  # str, int, list, NoneType …
    items: frozenset[Any]  # the types of a list's items
    required: bool


def soften(kind: type[Struct], data: Any) -> Any:
    """Return a copy of `data` with each value in the type that its field wants. A value that cannot be
    converted stays as it is, and the strict decoder refuses it. The values may be raw JSON.
    """
    if data == []:
        return {}  # PHP has one kind of array, and an empty one becomes a list
    if not isinstance(data, dict):
        return data
    fields = _fields(kind)
    softened = {
        name: _of_field(fields[name], value) if name in fields else value for name, value in data.items()
    }
    return {name: value for name, value in softened.items() if value is not _LEFT_OUT}


def _of_field(field: _Field, value: Any) -> Any:
    if isinstance(value, Raw):
        if Any in field.kinds or Raw in field.items:
            return value
        value = msgspec.json.decode(value)
    if isinstance(value, str) and not value.strip():
        return _of_blank(field, value)
    if field.name in _ALSO_INTEGERS and type(value) is int:
        return str(value)
    if list in field.kinds and isinstance(value, Mapping) and is_php_list(value):
        value = list(value.values())
    if list in field.kinds and isinstance(value, list):
        return [_of_value(field.items, item) for item in value]
    return _of_value(field.kinds, value)


def _of_blank(field: _Field, text: str) -> Any:
    if field.name in _NEVER_NULL:
        return ""
    if NoneType in field.kinds:
        return None
    return text if field.required else _LEFT_OUT


def _of_value(kinds: frozenset[Any], value: Any) -> Any:
    if bool in kinds and int not in kinds and isinstance(value, str | int):
        return _TRUTH.get(value, value)
    if isinstance(value, str) and str not in kinds:
        if int in kinds and (number := integer_of(value)) is not None:
            return number
        if float in kinds:
            return _float_of(value)
    return value


def _float_of(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


@lru_cache
def _fields(kind: type[Struct]) -> dict[str, _Field]:
    return {
        field.encode_name: _Field(field.encode_name, _kinds(field.type), _items(field.type), field.required)
        for field in msgspec.structs.fields(kind)
    }


def _kinds(annotation: Any) -> frozenset[Any]:
    """Return the types that an annotation allows, without bounds: `Annotated[int, …] | None` → int and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return frozenset().union(*map(_kinds, get_args(annotation)))
    return frozenset([origin or annotation])


def _items(annotation: Any) -> frozenset[Any]:
    origin = get_origin(annotation)
    if origin is list:
        return _kinds(get_args(annotation)[0])
    if origin in (Annotated, Union, UnionType):
        return frozenset().union(*map(_items, get_args(annotation)))
    return frozenset()
