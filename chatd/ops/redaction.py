"""Hides the secrets of a configuration when it is shown."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

HIDDEN = "(hidden)"
SECRETS = ("secret", "token", "password")  # the names of secret options end with one of these
# The password of user:password@ in a URL, which may contain an @, and query parameters whose name suggests a
# secret.
_PASSWORD = re.compile(r"(?<=://)([^/?#:]*):([^/?#]*)@")
_PARAMETER = re.compile(r"([?&][^=&]*(?:pass|secret|token|key)[^=&]*)=[^&#]*", re.IGNORECASE)


def redacted(key: str, value: Any) -> Any:
    """Return the value with its secrets replaced by `HIDDEN`."""
    if not isinstance(value, str) or not value:
        return value
    if key.endswith(SECRETS):
        return HIDDEN
    if key.endswith("url"):
        return _PARAMETER.sub(rf"\1={HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}@", value))
    return value


def holds_secret(path: Path) -> bool:
    """Whether a configuration file contains a secret."""
    data = tomllib.loads(path.read_text("utf-8"))
    return any(redacted(key, value) != value for values in data.values() for key, value in values.items())
