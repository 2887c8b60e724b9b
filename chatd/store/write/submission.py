"""Commands that wait for their commit, and their outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from chatd.core.errors import ChatError
from chatd.store.write.commands import AnyCommand, Result
from chatd.store.write.packing import pack, size

Outcome = Result | ChatError
Then = Callable[[Sequence[Outcome]], None]
log = structlog.get_logger()


class Submission:
    """Commands that are committed together or not at all, whether anybody waits for them or not.

    It gets its outcomes once: from the commit, or from the writer when the commit takes too long.
    """

    __slots__ = ("_done", "_outcomes", "_then", "bytes", "commands", "deadline")

    def __init__(self, commands: Sequence[AnyCommand], then: Then | None, seconds: float) -> None:
        """`seconds`: how long the commit may take."""
        self.commands = [pack(command) for command in commands]
        self.bytes = sum(map(size, self.commands))
        self.deadline = trio.current_time() + seconds
        self._outcomes: Sequence[Outcome] | None = None
        self._then = then
        self._done: trio.Event | None = None  # made by the first caller that waits

    def resolve(self, outcomes: Sequence[Outcome]) -> None:
        if self._outcomes is not None:
            return
        self._outcomes = outcomes
        if self._done is not None:
            self._done.set()
        if self._then is not None:
            try:
                self._then(outcomes)
            except Exception as error:  # a bug in one client's answer must not end the writer
                log.error("answer_failed", exc_info=error)

    async def outcomes(self) -> Sequence[Outcome]:
        """One outcome for each command.

        After the deadline all are Unavailable: nobody knows the real outcome.
        """
        if self._outcomes is None:
            self._done = self._done or trio.Event()
            await self._done.wait()
        assert self._outcomes is not None
        return self._outcomes

    async def outcome(self) -> Result:
        """The outcome of the only command. Raises it if it is a ChatError."""
        (outcome,) = await self.outcomes()
        if isinstance(outcome, ChatError):
            raise outcome
        return outcome
