"""Calls to the backend that fail. Clients learn nothing of the cause: the log has it, and metrics count it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge

from chatd.core.errors import CallFailed, ChatError, Unavailable
from chatd.observe.logs import Recurring

CAUSES = 20  # that are told apart; there are far fewer


class FailureLog:
    """A line for each new cause at once; while it lasts, a line now and then says how often it was met."""

    def __init__(self, event: str, failures: Counter, answers: Gauge) -> None:
        """`failures` has the label `reason`; `answers` is 1 while the last call was answered, else 0."""
        self._event, self._failures, self._answers = event, failures, answers
        self._causes: dict[str, Recurring] = {}
        answers.set(1)  # nothing is known against it

    @contextmanager
    def noted(self) -> Iterator[None]:
        """For a block that makes one call."""
        try:
            yield
        except CallFailed as error:
            self._failures.labels(error.kind).inc()
            self._answers.set(0)
            self._tell(error)
            raise
        except Unavailable:  # nobody has called: the breaker is open
            self._failures.labels("not_tried").inc()
            raise
        except ChatError:  # that was the answer
            self._answers.set(1)
            raise
        else:
            self._answers.set(1)

    def _tell(self, error: CallFailed) -> None:
        if error.reason not in self._causes:
            if len(self._causes) >= CAUSES:
                self._causes.clear()
            self._causes[error.reason] = Recurring(self._event)
        self._causes[error.reason].warn(cause=error.kind, error=error.reason)
