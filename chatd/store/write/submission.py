"""Commands that wait for their commit, and the outcomes that they come to."""

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
    """Commands on their way. They are committed whole or not at all, whoever waits for them or not.

    Its outcomes come once: from the commit, or from the writer's clock when that takes too long.
    """

    __slots__ = ("_done", "_outcomes", "_then", "bytes", "commands", "deadline")

    def __init__(self, commands: Sequence[AnyCommand], then: Then | None, seconds: float) -> None:
        """`seconds`: so long may the commit take."""
        self.commands = [pack(command) for command in commands]
        self.bytes = sum(map(size, self.commands))
        self.deadline = trio.current_time() + seconds
        self._outcomes: Sequence[Outcome] | None = None
        self._then = then
        self._done: trio.Event | None = None  # made by who waits

    def resolve(self, outcomes: Sequence[Outcome]) -> None:
        if self._outcomes is not None:
            return
        self._outcomes = outcomes
        if self._done is not None:
            self._done.set()
        if self._then is not None:
            try:
                self._then(outcomes)
            except Exception as error:  # of one client: the writer has others
                log.error("answer_failed", exc_info=error)

    async def outcomes(self) -> Sequence[Outcome]:
        """One for each command; Unavailable past the deadline, when the outcome is unknown."""
        if self._outcomes is None:
            self._done = self._done or trio.Event()
            await self._done.wait()
        assert self._outcomes is not None
        return self._outcomes

    async def outcome(self) -> Result:
        """The outcome of a single command, raised if it is an error."""
        (outcome,) = await self.outcomes()
        if isinstance(outcome, ChatError):
            raise outcome
        return outcome
