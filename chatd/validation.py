"""Says everything that is wrong with a decoded body at once, field by field.

msgspec stops at the first mistake, which is right for speed; this runs only after it refused.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import msgspec

_WHERE = re.compile(r" - at `.*`$")


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
            found[name] = [f"The {name} field is not valid: {reason(error)}."]
    if kind.__struct_config__.forbid_unknown_fields:
        for name in data.keys() - fields.keys():
            found[name] = [f"There is no such key{suggestion(name, fields)}."]
    return found


def reason(error: msgspec.ValidationError) -> str:
    """msgspec's sentence without its path, in lower case: ``expected `int`, got `str` ``."""
    text = _WHERE.sub("", str(error))
    return text[:1].lower() + text[1:]


def suggestion(name: str, known: Any) -> str:
    """` (did you mean x?)` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
