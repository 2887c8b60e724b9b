"""What a check of `chatd doctor` finds, and how a check is run: it has a deadline, and whatever it raises is a
finding, too.
"""

from __future__ import annotations

import inspect
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import trio

from chatd.config import Config
from chatd.core.errors import OperatorError, innermost

DEADLINE = 15.0  # seconds of one check


class Level(IntEnum):
    """Also the exit code of the worst."""

    OK = 0
    WARNING = 1
    PROBLEM = 2


@dataclass(frozen=True)
class Finding:
    """`subject` is what was looked at, `found` what it was like, `advice` what to do."""

    level: Level
    subject: str
    found: str
    advice: str = ""


def ok(subject: str, found: str, advice: str = "") -> Finding:
    return Finding(Level.OK, subject, found, advice)


def warning(subject: str, found: str, advice: str) -> Finding:
    return Finding(Level.WARNING, subject, found, advice)


def problem(subject: str, found: str, advice: str) -> Finding:
    return Finding(Level.PROBLEM, subject, found, advice)


@dataclass
class Case:
    """What is examined. `url` is the public one, if it is known; `write`: a message may be stored.

    `running`: the daemon answered on api.bind.
    """

    config: Config
    path: Path | None = None
    url: str = ""
    write: bool = False
    running: bool = field(default=False, compare=False)


def others_may(path: Path, right: int) -> bool:
    """Whether everybody on this machine has a right to a file (S_IROTH, S_IWOTH), and can get there."""
    way = all(above.stat().st_mode & stat.S_IXOTH for above in path.absolute().parents)
    return way and bool(path.stat().st_mode & right)


# A check is plain, and runs in a thread, or async. None where it does not apply.
Outcome = Iterable[Finding] | Finding | None
Check = Callable[[Case], Outcome | Awaitable[Outcome]]


async def examine(case: Case, checks: Sequence[Check], deadline: float = DEADLINE) -> AsyncIterator[Finding]:
    """One check after the other: those that measure shall not be disturbed by the others."""
    for check in checks:
        for finding in await _findings(case, check, deadline):
            yield finding


async def _findings(case: Case, check: Check, deadline: float) -> list[Finding]:
    subject = check.__name__.replace("_", " ")
    with trio.move_on_after(deadline):
        try:
            return await _run(case, check)
        except OperatorError as error:
            return [problem(subject, str(error), "")]
        except Exception as error:
            return [problem(subject, f"could not be checked: {_told(error)}", "")]
    return [problem(subject, f"took longer than {deadline:.0f} s", "See whether something hangs.")]


async def _run(case: Case, check: Check) -> list[Finding]:
    if inspect.iscoroutinefunction(check):
        return _listed(await check(case))
    # Left to itself past its deadline: no driver can be interrupted.
    return await trio.to_thread.run_sync(lambda: _listed(check(case)), abandon_on_cancel=True)  # type: ignore[arg-type]


def _listed(outcome: Outcome) -> list[Finding]:
    if outcome is None:
        return []
    return [outcome] if isinstance(outcome, Finding) else list(outcome)


def _told(error: BaseException) -> str:
    error = innermost(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
