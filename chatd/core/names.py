"""Names of channels and streams in Redis, and patterns for them, as Redis matches them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MAGIC = "*?["
_Step = re.Pattern[str] | None  # matches one character; None matches any number of them


def is_pattern(name: str) -> bool:
    return any(sign in name for sign in _MAGIC)


class Names:
    """A list of names and patterns."""

    def __init__(self, listed: Iterable[str]) -> None:
        self.listed = list(listed)
        self.exact = [name for name in self.listed if not is_pattern(name)]
        self.patterns = [name for name in self.listed if is_pattern(name)]
        self._steps = [(pattern, _steps(pattern)) for pattern in self.patterns]

    def entry_for(self, name: str) -> str | None:
        """Return the entry that matches a name: the name itself if it is listed, else the first pattern."""
        if name in self.exact:
            return name
        return next((pattern for pattern, steps in self._steps if _match(steps, name)), None)


def _steps(pattern: str) -> list[_Step]:
    """Split a pattern at `*`, `?`, `[a-z]`, `[^a]`, and `\\` before any of them. A `[` without end includes the
    rest of the pattern.
    """
    # Each step takes at least one character of the pattern, and the last alternative any.
    found = re.findall(r"\*+|\?|\[\^?(?:\\.|[^\]])*\]?|\\.|.", pattern, re.DOTALL)
    return [None if step[0] == "*" else re.compile(_one(step), re.DOTALL) for step in found]


def _match(steps: list[_Step], name: str) -> bool:
    """Whether the steps match the whole name. It goes back only to the last `*`, so it is never exponential."""
    step = at = 0
    back: tuple[int, int] | None = None
    while at < len(name):
        if step < len(steps) and steps[step] is None:
            step += 1
            back = step, at
        elif step < len(steps) and (one := steps[step]) is not None and one.fullmatch(name[at]):
            step, at = step + 1, at + 1
        elif back is not None:
            step, at = back[0], back[1] + 1
            back = step, at
        else:
            return False
    return all(one is None for one in steps[step:])


def _one(step: str) -> str:
    if step == "?":
        return "."
    if step.startswith("["):
        return _set(step)
    return re.escape(step[-1])


def _set(step: str) -> str:
    negated = step.startswith("[^")
    inner = step[2 if negated else 1 :].removesuffix("]")
    parts = [_part(part) for part in re.findall(r"\\.|[^\\]-[^\\]|.", inner, re.DOTALL)]
    if not parts:
        return "." if negated else "(?!)"
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _part(part: str) -> str:
    if len(part) == 3:  # Redis takes the ends of a range in either order
        first, last = sorted((part[0], part[2]))
        return f"{re.escape(first)}-{re.escape(last)}"
    return re.escape(part[-1])
