"""Ends the process on an unexpected error, even if a thread hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from chatd.core.errors import OperatorError, innermost

GRACE = 5.0  # seconds for the other tasks to end: a thread that waits in a driver cannot be cancelled

log = structlog.get_logger()


@contextmanager
def fatal() -> Iterator[None]:
    """For each task that runs as long as the process: an error that leaves the block ends the process."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or (
            isinstance(error, BaseExceptionGroup) and error.subgroup(Exception) is not None
        ):
            _end_soon(error)
        raise


async def run_fatal(task: Callable[..., Awaitable[None]], *arguments: Any, **named: Any) -> None:
    """`fatal`, for `nursery.start` and `nursery.start_soon`."""
    with fatal():
        await task(*arguments, **named)


def _end_soon(error: BaseException) -> None:
    if not isinstance(innermost(error), OperatorError):
        log.critical("unforeseen_error", error=repr(innermost(error))[:500])

    def end() -> None:
        log.critical("threads_did_not_end", seconds=GRACE, exc_info=error)
        os._exit(1)

    timer = threading.Timer(GRACE, end)
    timer.daemon = True
    timer.start()
