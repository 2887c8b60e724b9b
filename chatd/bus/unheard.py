"""Logs channels and streams of other services that chatd does not read, each once, with the line to add."""

from __future__ import annotations

import json

import structlog

from chatd.core.names import Names
from chatd.observe import metrics

MOST_NAMES, MOST_CHARS = 20, 200  # that are logged: everybody who may write to Redis can invent names

log = structlog.get_logger()


class Unheard:
    """`option` of [redis] lists the names that chatd reads."""

    def __init__(self, option: str, names: Names) -> None:
        self._option, self._names = option, names
        self._told: set[str] = set()

    def note(self, name: str) -> None:
        if name not in self._told:
            if len(self._told) == MOST_NAMES or len(name) > MOST_CHARS:
                return
            self._told.add(name)
            line = line_for(self._option, self._names, name)
            log.warning("redis_name_not_listed", name=name, advice=f"if it is yours, under [redis]: {line}")
        metrics.NOT_LISTED.labels(self._option, name).inc()


def line_for(option: str, names: Names, name: str) -> str:
    """Return the line of chatd.toml that adds a name."""
    return f"{option} = {json.dumps([*names.listed, name], ensure_ascii=False)}"
