"""Says everything that is wrong with a decoded body at once, field by field.

msgspec stops at the first mistake, which is right for speed; this runs only after it refused.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, get_args, get_origin

import msgspec

_WHERE = re.compile(r" - at .*$")
_EXPECTED = re.compile(r"Expected `([\w| ]+)`, got `(\w+)`")
_NOUNS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def mistakes(kind: type[msgspec.Struct], data: dict[str, Any], *, strict: bool = True) -> dict[str, list[str]]:
    """`{field: [sentence, …]}` for what keeps `data` from being a `kind`; empty when nothing does."""
    found: dict[str, list[str]] = {}
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, field in fields.items():
        if name not in data:
            if field.required:
                found[name] = [f"The {name} field is required."]
            continue
        try:
            msgspec.convert(data[name], field.type, strict=strict)
        except msgspec.ValidationError as error:
            found[name] = [f"The {name} field {_allowed(field.type) or reason(error)}."]
    if kind.__struct_config__.forbid_unknown_fields:
        for name in data.keys() - fields.keys():
            found[name] = [f"There is no such key{suggestion(name, fields)}."]
    return found


def reason(error: msgspec.ValidationError) -> str:
    """msgspec's sentence for people, without its path: `must be an integer, not text`."""
    text = _WHERE.sub("", str(error))
    if expected := _EXPECTED.fullmatch(text):
        wanted = " or ".join(_NOUNS.get(word, word) for word in expected[1].split(" | "))
        return f"must be {wanted}, not {_NOUNS.get(expected[2], expected[2])}"
    if text == "Expected `str` of length >= 1":
        return "must not be empty"
    return text.replace("Expected ", "must be ", 1) if text.startswith("Expected ") else f"is wrong: {text}"


def _allowed(kind: Any) -> str:
    """For a field with a fixed choice: what may be chosen."""
    if get_origin(kind) is not Literal:
        return ""
    return f"must be {' or '.join(repr(choice) for choice in get_args(kind))}"


def suggestion(name: str, known: Any) -> str:
    """` (did you mean x?)` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
