"""Logs and counts failed calls to the backend. Clients do not learn the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge

from chatd.core.errors import CallFailed, ChatError, Unavailable
from chatd.observe.logs import Recurring

CAUSES = 20  # causes with a log line of their own; there are far fewer in practice


class FailureLog:
    """Logs a new cause at once. While a cause lasts, it logs a line every few seconds, with a count."""

    def __init__(self, event: str, failures: Counter, answers: Gauge) -> None:
        """`failures` has the label `reason`; `answers` is 1 while the last call was answered, else 0."""
        self._event, self._failures, self._answers = event, failures, answers
        self._causes: dict[str, Recurring] = {}
        answers.set(1)  # there was no failure yet

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A block that makes one call. Notes its outcome and raises its errors again."""
        try:
            yield
        except CallFailed as error:
            self._failures.labels(error.kind).inc()
            self._answers.set(0)
            self._tell(error)
            raise
        except Unavailable:  # there was no call, because the breaker is open
            self._failures.labels("not_tried").inc()
            raise
        except ChatError:  # the backend answered with a refusal
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
