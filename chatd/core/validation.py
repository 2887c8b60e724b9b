"""Describes all mistakes in a decoded body at once, field by field.

msgspec is fast and stops at the first mistake. This module is slower and runs only after msgspec has refused a
body.
"""

from __future__ import annotations

import difflib
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import UnsetType

from chatd.core.ids import noun_of

# The forms of msgspec's error messages: wrong type, value out of bounds, wrong length; and the place at the
# end.
_TYPES = re.compile(r"Expected `([\w| ]+)`, got `(\w+)`")
_BOUND = re.compile(r"Expected `\w+` (>=|<=|>|<) ([-\d.e+]+)")
_LENGTH = re.compile(r"Expected `(\w+)` of length (>=|<=) (\d+)")
_PLACE = re.compile(r" - at (.*)$")

_NOUNS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_PARTS = {"str": "characters", "array": "items"}
_BY_TYPE = {int: "int", float: "float", str: "str", bool: "bool", list: "array", dict: "object"}


def mistakes(kind: type[msgspec.Struct], data: dict[str, Any], *, strict: bool = True) -> dict[str, list[str]]:
    """Why `data`, decoded from JSON, is not a valid `kind`: `{field: [sentence, …]}`; empty if it is valid."""
    found: dict[str, list[str]] = {}
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, field in fields.items():
        if name not in data:
            if field.required:
                found[name] = [f"The {name} field is required."]
            continue
        try:
            msgspec.convert(data[name], field.type, strict=strict, str_keys=True)
        except msgspec.ValidationError as error:
            found[name] = [f"The {name} field {_of_value(data[name], reason(error, field.type))}."]
    if kind.__struct_config__.forbid_unknown_fields:
        for name in data.keys() - fields.keys():
            found[name] = [f"There is no such key{suggestion(name, fields)}."]
    return found


def reason(error: msgspec.ValidationError, kind: Any = Any) -> str:
    """msgspec's error about a field of this `kind`, in words that follow the field's name.

    `must be an integer, not text`, or `is wrong: each key must be …`.
    """
    text = str(error)
    place = _PLACE.search(text)
    inner = _inner(place[1]) if place else ""
    sentence = _sentence(_PLACE.sub("", text), _item_of(kind) if inner else kind)
    return f"is wrong: {inner} {sentence}" if inner else sentence


def _of_value(value: Any, said: str) -> str:
    """A UUID is called one: whoever has those as ids shall not look for a mistake in the quotes."""
    if isinstance(value, str) and said.startswith("must be an integer") and said.endswith("not text"):
        return said.removesuffix("text") + noun_of(value)
    return said


def _sentence(text: str, kind: Any) -> str:
    if found := _TYPES.fullmatch(text):
        wanted = _allowed(kind) or [_NOUNS.get(one, one) for one in found[1].split(" | ") if one != "null"]
        return f"must be {' or '.join(wanted)}, not {_NOUNS.get(found[2], found[2])}"
    if found := _BOUND.fullmatch(text):
        return f"must be {_BOUNDS[found[1]]} {found[2]}"
    if found := _LENGTH.fullmatch(text):
        few = found[2] == ">="
        return "must not be empty" if few else f"must have at most {found[3]} {_PARTS.get(found[1], 'entries')}"
    if text.startswith("Invalid enum value") and (wanted := _allowed(kind)):
        return f"must be {' or '.join(wanted)}"
    return "holds a number that is out of range" if text == "Number out of range" else "is not valid"


def _inner(place: str) -> str:
    """Names the part at `$.rooms[...].after` or `$[...].after`; empty if the place is the whole field."""
    if place.startswith("`key`"):
        return "each key"
    steps = re.findall(r"\[[^]]*\]|\.\w+", place.strip("`").lstrip("$"))
    within = steps[1:] if steps[:1] and steps[0].startswith(".") else steps
    if not within:
        return ""
    last = within[-1]
    return last[1:] if last.startswith(".") else "each value" if last == "[...]" else "each item"


def _allowed(kind: Any) -> list[str]:
    """The values or types that `kind` allows, in words. Null is not among them: it means that there is no
    value.
    """
    origin = get_origin(kind)
    if origin is Annotated:
        return _allowed(get_args(kind)[0])
    if origin is Literal:
        return [repr(choice) for choice in get_args(kind)]
    if origin in (Union, UnionType):
        return [noun for one in get_args(kind) for noun in _allowed(one)]
    if kind in (NoneType, UnsetType):
        return []
    base = origin or kind
    name = "object" if isinstance(base, type) and issubclass(base, msgspec.Struct) else _BY_TYPE.get(base)
    return [_NOUNS[name]] if name else []


def _item_of(kind: Any) -> Any:
    """The type of a list's items; Any for every other type."""
    return get_args(kind)[0] if get_origin(kind) is list else Any


def suggestion(name: str, known: Any) -> str:
    """` (did you mean x?)` if a known name is similar, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
