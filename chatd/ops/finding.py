"""The findings of `chatd doctor`, and how its checks run: each has a deadline, and an error that it raises
becomes a finding.
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

DEADLINE = 15.0  # seconds for one check


class Level(IntEnum):
    """How bad a finding is. The exit code of `doctor` is that of the worst finding."""

    OK = 0
    WARNING = 1
    PROBLEM = 2


@dataclass(frozen=True)
class Finding:
    """`subject`: what was checked. `found`: the result. `advice`: what the operator should do."""

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
    """What the checks examine. `url`: the public URL, or empty. `write`: whether a message may be stored.

    `running`: whether the daemon has answered on api.bind; the check of the API sets it.
    """

    config: Config
    path: Path | None = None
    url: str = ""
    write: bool = False
    running: bool = field(default=False, compare=False)


def others_may(path: Path, right: int) -> bool:
    """Whether all users of this machine have a right (S_IROTH, S_IWOTH) to a file and can enter its
    directories.
    """
    way = all(above.stat().st_mode & stat.S_IXOTH for above in path.absolute().parents)
    return way and bool(path.stat().st_mode & right)


# A check is async, or a plain function, which runs in a thread. It returns None if it does not apply.
Outcome = Iterable[Finding] | Finding | None
Check = Callable[[Case], Outcome | Awaitable[Outcome]]


async def examine(case: Case, checks: Sequence[Check], deadline: float = DEADLINE) -> AsyncIterator[Finding]:
    """Run the checks one after the other, so that they do not disturb each other's measurements."""
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
            return [problem(subject, f"could not be checked: {_text(error)}", "")]
    return [problem(subject, f"took longer than {deadline:.0f} s", "Check whether something hangs.")]


async def _run(case: Case, check: Check) -> list[Finding]:
    if inspect.iscoroutinefunction(check):
        return _listed(await check(case))
    # After the deadline the thread is abandoned, because a call of a database driver cannot be interrupted.
    return await trio.to_thread.run_sync(lambda: _listed(check(case)), abandon_on_cancel=True)  # type: ignore[arg-type]


def _listed(outcome: Outcome) -> list[Finding]:
    if outcome is None:
        return []
    return [outcome] if isinstance(outcome, Finding) else list(outcome)


def _text(error: BaseException) -> str:
    error = innermost(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
