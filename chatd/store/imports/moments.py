"""Reads the dates of other databases: `2024-01-02 03:04:05`, with or without a fraction and an offset."""

from __future__ import annotations

import re
from datetime import UTC, datetime, tzinfo

from chatd.core.model import timestamp

# `fromisoformat` alone would also take 20240102, or any character between date and time.
_FORM = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d(:?\d\d)?)?)?")
_ZERO = re.compile(r"0000-|\d{4}-00-|\d{4}-\d\d-00")  # MySQL stores such dates unless it is strict

NO_DATE = "is not a date like 2024-01-02 03:04:05"
ZERO_DATE = "is a zero date of MySQL"


def moment(text: str, zone: tzinfo) -> str:
    """The time as chatd writes it. `zone` counts for a text without an offset.

    Raises ValueError, with NO_DATE or ZERO_DATE.
    """
    if _ZERO.match(text):
        raise ValueError(ZERO_DATE)
    if not _FORM.fullmatch(text):
        raise ValueError(NO_DATE)
    try:
        found = datetime.fromisoformat(text)
        return timestamp((found if found.tzinfo else found.replace(tzinfo=zone)).astimezone(UTC))
    except (ValueError, OverflowError):
        raise ValueError(NO_DATE) from None
