"""What a run came to, for a person.

`python -m tests.faults.report FILE` prints the tables of docs/faults.md from what `--json` has written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tests.faults.runner import Phase, Result

LOST = ("lost-write",)
DOUBLED = ("duplicate-write", "duplicate-receive", "duplicate-seq")
SKIPPED = ("skip", "unseen", "seq-hole", "nonmonotonic-receive")
LEAKED = ("leak",)
MOVED = ("moved-silently",)
COUNTED = (*LOST, *DOUBLED, *SKIPPED, *LEAKED, *MOVED)
SHOWN = 12  # anomalies that are printed
FAULT = 30  # characters of the longest pair

_LEGEND = (
    "moved: clients that were given another history and not told; gone: acknowledged writes that were lost",
    "with a database that went back; repaired: holes read from the database; afresh: subscriptions told to",
    "start over; away: longest time without an acknowledgement while four posters were posting; p50 / p99: of",
    "acknowledged posts; settled: from the end of the load until every client had everything; presence: from",
    "then until everybody, the backend too, saw truly who is online; peak: memory of the largest chatd.",
)


def _count(*names: str) -> Callable[[Phase], str]:
    return lambda phase: str(sum(phase.anomalies.get(name, 0) for name in names))


def _other(phase: Phase) -> str:
    return str(sum(count for name, count in phase.anomalies.items() if name not in COUNTED))


def _seconds(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f} s"


# By the heading: how wide, and what a phase has to say.
_COLUMNS: dict[str, tuple[int, Callable[[Phase], str]]] = {
    "ack’ed": (8, lambda phase: f"{phase.acknowledged:,}"),
    "unknown": (8, lambda phase: f"{phase.unknown:,}"),
    "lost": (5, _count(*LOST)),
    "doubled": (8, _count(*DOUBLED)),
    "skipped": (8, _count(*SKIPPED)),
    "leaked": (7, _count(*LEAKED)),
    "moved": (6, _count(*MOVED)),
    "other": (6, _other),
    "gone": (6, lambda phase: f"{phase.gone:,}"),
    "repaired": (9, lambda phase: f"{phase.repaired:,}"),
    "afresh": (7, lambda phase: f"{phase.started_over:,}"),
    "away": (8, lambda phase: f"{phase.unavailable:.2f} s"),
    "p50 / p99": (17, lambda phase: f"{phase.median * 1000:.0f} / {phase.p99 * 1000:.0f} ms"),
    "settled": (8, lambda phase: _seconds(phase.settled, "never")),
    "presence": (9, lambda phase: _seconds(phase.presence, "–")),
    "peak": (7, lambda phase: f"{phase.peak / 2**20:.0f} MB"),
}


def table(result: Result) -> Iterator[str]:
    yield f"{'fault':<{FAULT}}" + "".join(f"{name:>{width}}" for name, (width, _) in _COLUMNS.items())
    for phase in result.phases:
        yield f"{phase.name:<{FAULT}}" + "".join(f"{say(phase):>{width}}" for width, say in _COLUMNS.values())
    yield ""
    yield from _LEGEND
    yield _summary(result)
    for anomaly in result.verdict.anomalies[:SHOWN]:
        yield f"  {anomaly.name} in conversation {anomaly.conversation}: {anomaly.sentence}"
    for trouble in result.troubles:
        yield f"  crashed: {trouble}"


def markdown(result: Result) -> Iterator[str]:
    yield f"**`{result.plan.kind}`.** {_summary(result)}"
    yield ""
    yield "| " + " | ".join(["", *_COLUMNS]) + " |"
    yield "|---" * (len(_COLUMNS) + 1) + "|"
    for phase in result.phases:
        yield "| " + " | ".join([phase.name, *(say(phase) for _, say in _COLUMNS.values())]) + " |"
    yield ""


def _summary(result: Result) -> str:
    verdict = result.verdict
    return (
        f"{verdict.acknowledged:,} acknowledged, {verdict.unknown:,} unknown, {verdict.failed:,} refused;"
        f" {verdict.received:,} changes received over {verdict.connections:,} connections,"
        f" {verdict.resumed:,} of them resumed; {verdict.removed:,} removals."
        f" Valid: {'yes' if result.valid else 'NO'}."
    )


if __name__ == "__main__":
    for one in msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Result]):
        print("\n".join(markdown(one)))
