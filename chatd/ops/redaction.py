"""Secrets of a configuration: which options hold one, and how they look when they are shown."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
SECRETS = ("secret", "token", "password")  # what the name of an option ends with that is one
# user:password@ of a URL, and what stands after ? under a name that sounds like one. A password may hold an @.
_PASSWORD = re.compile(r"(?<=://)([^/?#:]*):([^/?#]*)@")
_PARAMETER = re.compile(r"([?&][^=&]*(?:pass|secret|token|key)[^=&]*)=[^&#]*", re.IGNORECASE)


def redacted(key: str, value: Any) -> Any:
    """A value as it may be shown."""
    if not isinstance(value, str) or not value:
        return value
    if key.endswith(SECRETS):
        return HIDDEN
    if key.endswith("url"):
        return _PARAMETER.sub(rf"\1={HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}@", value))
    return value


def holds_secret(path: Path) -> bool:
    """Whether a configuration file has a value that is not to be shown."""
    data = tomllib.loads(path.read_text("utf-8"))
    return any(redacted(key, value) != value for values in data.values() for key, value in values.items())
