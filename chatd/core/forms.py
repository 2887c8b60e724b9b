"""A form as PHP reads it: `meta[tags][]=a&meta[tags][]=b` is `{"meta": {"tags": ["a", "b"]}}`. Pure."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl

from chatd.core.errors import BadRequest
from chatd.core.limits import META_DEPTH

FORM = "application/x-www-form-urlencoded"
FIELDS = 1000  # of one form, as PHP's max_input_vars

_STEP = re.compile(r"\[([^\]]*)\]")
_NAME = re.compile(r"([^\[]+)((?:\[[^\]]*\])*)")


def is_form(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == FORM


def read_form(body: bytes) -> dict[str, Any]:
    """Decode a form. Each value is text, or None if it is empty. Raises BadRequest."""
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=FIELDS)
    except UnicodeDecodeError:
        raise BadRequest("The form is not in UTF-8.") from None
    except ValueError:
        raise BadRequest(f"The form has more than {FIELDS} fields.") from None
    form: dict[str, Any] = {}
    for name, value in pairs:
        _put(form, name, value or None)
    return {name: _with_lists(value) for name, value in form.items()}


def _put(form: dict[str, Any], name: str, value: str | None) -> None:
    found = _NAME.fullmatch(name)
    steps = [found[1], *_STEP.findall(found[2])] if found else [name]
    if len(steps) > META_DEPTH:
        raise BadRequest(f"A field of the form is nested more than {META_DEPTH} deep.")
    place = form
    for step in steps[:-1]:
        key = step or _next(place)
        if not isinstance(place.get(key), dict):
            place[key] = {}
        place = place[key]
    place[steps[-1] or _next(place)] = value


def _next(place: dict[str, Any]) -> str:
    """Return the key that `[]` stands for: the next number that is free."""
    number = len(place)
    while str(number) in place:
        number += 1
    return str(number)


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(one) for key, one in value.items()}
    return list(inner.values()) if list(inner) == [str(number) for number in range(len(inner))] else inner
