"""Logging: one event per line, as JSON for machines or as columns for a terminal. Never logs
messages or tokens.

Modules get their loggers from structlog; this module configures them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# The numbers of syslog(3): the journal reads `<4>` at the start of a line as a warning.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

SELDOM = 10.0  # seconds between two lines about the same problem


class _Seldom(logging.Filter):
    """Lets one line pass in `SELDOM` seconds, without its traceback: Trio's accept loop logs ten times a second
    when the process has no descriptors left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = -SELDOM

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        if time.monotonic() - self._last < SELDOM:
            return False
        self._last = time.monotonic()
        return True


class Recurring:
    """Logs an event that may happen very often: the first at once, and then at most one line
    in `every` seconds.

    The field `more` of a line counts the similar events since the last line, which were not logged. Each
    function returns whether it has written a line.
    """

    def __init__(self, event: str, *, every: float = SELDOM) -> None:
        self._event, self._every, self._log = event, every, structlog.get_logger()
        self._written_at, self._more = -every, 0

    def info(self, **fields: Any) -> bool:
        return self._write(self._log.info, fields)

    def warn(self, **fields: Any) -> bool:
        return self._write(self._log.warning, fields)

    def error(self, **fields: Any) -> bool:
        return self._write(self._log.error, fields)

    def _write(self, write: Callable[..., None], fields: dict[str, Any]) -> bool:
        now = time.monotonic()
        if now - self._written_at < self._every:
            self._more += 1
            return False
        more = {"more": self._more} if self._more else {}
        self._written_at, self._more = now, 0
        write(self._event, **fields, **more)
        return True


class _Worker:
    """Adds the worker's number to each line, because several workers write to one log."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line["worker"] = self._number
        return line


class _Threshold:
    """Drops lines below the level. structlog's own filter cannot change after the first
    line, but a reload must.
    """

    def __init__(self) -> None:
        self.level = logging.INFO

    def __call__(self, _logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if _LEVELS.get(method, logging.ERROR) < self.level:
            raise structlog.DropEvent
        return line


_threshold = _Threshold()


def set_level(level: str) -> None:
    """`level`: debug, info, warning or error."""
    _threshold.level = _LEVELS[level]


def _with_priority(_logger: Any, method: str, line: Any) -> str:
    return f"<{_PRIORITIES.get(method, 3)}>{line}"


def _in_journal() -> bool:
    """Whether standard error is the journal's socket: systemd.exec(5), $JOURNAL_STREAM."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def configure(level: str, form: str) -> None:
    """`level`: debug, info, warning or error. `form`: json, text, or auto (text on a terminal)."""
    set_level(level)
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        # If `rich` is installed, the default formatter prints all local variables, with messages and tokens.
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,
            timestamp_key="ts",
        )
        if text
        else structlog.processors.JSONRenderer()
    )
    worker = os.environ.get("CHATD_WORKER_NUMBER")
    structlog.configure(
        processors=[
            _threshold,
            structlog.processors.add_log_level,
            *([_Worker(int(worker))] if worker else []),
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.StackInfoRenderer(),
            *([] if text else [structlog.processors.format_exc_info]),
            renderer,
            *([_with_priority] if _in_journal() and not text else []),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        # This logger writes a line with one call, so that lines of workers do not mix.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Quart, Hypercorn and Alembic log with the standard library. Show only their warnings and errors.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("trio.serve_listeners").addFilter(_Seldom())
