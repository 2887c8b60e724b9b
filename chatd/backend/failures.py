"""Logs and counts failed calls to the backend. Clients do not learn the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge

from chatd.core.errors import CallFailed, ChatError, Unavailable
from chatd.observe.logs import Recurring

CAUSES = 20  # causes with a log line of their own; there are far fewer in practice


def advice_for(status: int, expected: str) -> str:
    """What the operator can do about an answer with this status. `expected` is the answer that chatd needs.

    The causes are the usual ones of Laravel applications.
    """
    if 300 <= status < 400:
        return (
            "the backend redirects, perhaps to its login page: define the route in routes/api.php, without"
            " `auth`, and configure its full address (https://…/api/…)"
        )
    if status == 419:
        return (
            "Laravel's CSRF check refuses the call: define the route in routes/api.php, not in routes/web.php"
        )
    if status == 429:
        return "the backend limits the rate of calls: exempt this route from `throttle`"
    if status >= 500:
        return "the backend failed: see its own log (storage/logs/laravel.log)"
    if status >= 400:
        return "the backend does not accept the call: see its own log"
    return f"the backend must answer with status 200 and {expected} as JSON"


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
        advice = {"advice": error.advice} if error.advice else {}
        self._causes[error.reason].warn(cause=error.kind, error=error.reason, **advice)
