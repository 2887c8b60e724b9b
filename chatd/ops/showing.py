"""Shows the effective configuration as TOML, without its secrets, and where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from chatd.config import SECTIONS, Config, Origins
from chatd.ops.redaction import redacted


def as_toml(config: Config, origins: Origins) -> str:
    """Return all options. A comment after each value that is not the default names its origin."""
    return "\n".join(_lines(config, origins)).strip()


def _lines(config: Config, origins: Origins) -> Iterator[str]:
    for section, kind in SECTIONS.items():
        yield f"\n[{section}]"
        values, defaults = msgspec.to_builtins(getattr(config, section)), msgspec.to_builtins(kind())
        for key, value in values.items():
            line = f"{key} = {_toml(redacted(key, value))}"
            origin = origins.get((section, key)) if value != defaults[key] else None
            yield f"{line:<40}  # {origin}" if origin else line


def _toml(value: Any) -> str:
    """JSON is valid TOML here, except for the control character DEL, which TOML requires to be escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
