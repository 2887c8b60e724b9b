"""Reads ids that other programs write: an integer, or its digits as text, as forms and databases give it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chatd.core.limits import MAX_ID

_INTEGER = re.compile(r"\s*([+-]?(?:0|[1-9][0-9]{0,29}))\s*", re.ASCII)
_UUID = re.compile(r"\s*[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}\s*", re.IGNORECASE)
_ULID = re.compile(r"\s*[0-7][0-9A-HJKMNP-TV-Z]{25}\s*", re.IGNORECASE)  # Crockford's base32, 128 bits


def integer_of(text: str) -> int | None:
    """Read an integer by Laravel's rule `integer`, without leading zeros. Returns None for other text."""
    found = _INTEGER.fullmatch(text)
    return int(found[1]) if found else None


def number_of(value: Any) -> Any:
    """Return the integer that a text stands for, and every other value unchanged."""
    number = integer_of(value) if isinstance(value, str) else None
    return value if number is None else number


def id_of(value: Any) -> int | None:
    """Return an id from 1 to MAX_ID, or None if the value is not an id."""
    number = number_of(value)
    return number if type(number) is int and 1 <= number <= MAX_ID else None


def ids_of(listed: Any) -> list[int] | None:
    """Return a list of ids, or None if the value is not one. A missing list is empty, and PHP turns a list with
    gaps into an object.
    """
    if isinstance(listed, dict) and is_php_list(listed):
        listed = list(listed.values())
    if listed is None:
        return []
    ids = [id_of(one) for one in listed] if isinstance(listed, list) else [None]
    return None if None in ids else ids  # type: ignore[return-value]  # mypy does not see what is not in it


def is_php_list(value: Mapping[Any, Any]) -> bool:
    """Whether all keys are numbers: PHP's array_filter turns a list into such an object."""
    return all(isinstance(key, str) and key.isascii() and key.isdecimal() for key in value)


def noun_of(text: str) -> str:
    """Name what a text is that was sent as an id."""
    if _UUID.fullmatch(text):
        return "a UUID"
    return "a ULID" if _ULID.fullmatch(text) else "text"
