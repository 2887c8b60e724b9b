"""Ids as text: Laravel's rule `integer` accepts "1" and " 1 ", and does not convert them. Pure."""

from __future__ import annotations

import re
from typing import Any

_DECIMAL = re.compile(r"\s*([1-9][0-9]{0,15})\s*", re.ASCII)


def number_of(value: Any) -> Any:
    """The number that a text is, if it is one without sign and leading zeros; otherwise the value itself."""
    found = _DECIMAL.fullmatch(value) if isinstance(value, str) else None
    return int(found[1]) if found else value
