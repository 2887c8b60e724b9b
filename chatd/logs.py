"""Logging: one event a line, JSON for machines, columns for a terminal. No message bodies, no tokens.

Every module takes its logger from structlog; this says how lines look.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

SELDOM = 10.0  # seconds between two lines about the same trouble


class _Seldom(logging.Filter):
    """A line now and then, without a traceback: an accept loop without descriptors tries ten times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -SELDOM

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        if time.monotonic() - self._last < SELDOM:
            return False
        self._last = time.monotonic()
        return True


class _Worker:
    """Tells apart whose line it is, where several processes write to one log."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, _logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line["worker"] = self._number
        return line


def configure(level: str, form: str) -> None:
    """`level`: debug, info, warning or error. `form`: json, text, or auto (text on a terminal)."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        # Left to itself it shows what every variable holds, bodies and tokens, where `rich` is installed.
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        if text
        else structlog.processors.JSONRenderer()
    )
    worker = os.environ.get("CHATD_WORKER_NUMBER")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *([_Worker(int(worker))] if worker else []),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if text else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        # A line is one write: workers share their standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Quart, Hypercorn and Alembic use the standard library: only what is wrong with them is of interest.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("trio.serve_listeners").addFilter(_Seldom())
