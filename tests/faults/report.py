"""What a run came to, for a person."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.runner import Phase, Result

LOST = ("lost-write",)
DOUBLED = ("duplicate-write", "duplicate-receive", "duplicate-seq")
SKIPPED = ("skip", "unseen", "seq-hole", "nonmonotonic-receive")
LEAKED = ("leak",)
MOVED = ("moved-silently",)
COUNTED = (*LOST, *DOUBLED, *SKIPPED, *LEAKED, *MOVED)
SHOWN = 12  # anomalies that are printed

_HEAD = (
    f"{'fault':<30}{'ack’ed':>8}{'unknown':>8}{'lost':>6}{'doubled':>8}{'skipped':>8}{'leaked':>7}"
    f"{'moved':>6}{'other':>6}{'gone':>6}{'repaired':>9}{'afresh':>7}{'away':>8}{'p50':>8}{'p99':>8}{'settled':>9}{'peak':>8}"
)
_LEGEND = (
    "moved: clients that were given another history and not told; gone: acknowledged writes that were lost",
    "with a database that went back; repaired: holes read from the database; afresh: subscriptions told to",
    "start over; away: longest time without an acknowledgement while four posters were posting; p50, p99: of",
    "acknowledged posts; settled: from the end of the load until every client had everything; peak: memory of",
    "the larger chatd.",
)


def table(result: Result) -> Iterator[str]:
    verdict = result.verdict
    yield _HEAD
    for phase in result.phases:
        yield _row(phase)
    yield ""
    yield from _LEGEND
    yield (
        f"{verdict.acknowledged:,} acknowledged, {verdict.unknown:,} unknown, {verdict.failed:,} refused;"
        f" {verdict.received:,} changes received over {verdict.connections:,} connections,"
        f" {verdict.resumed:,} of them resumed; {verdict.removed:,} removals."
        f" Valid: {'yes' if result.valid else 'NO'}."
    )
    for anomaly in verdict.anomalies[:SHOWN]:
        yield f"  {anomaly.name} in conversation {anomaly.conversation}: {anomaly.sentence}"
    for trouble in result.troubles:
        yield f"  crashed: {trouble}"


def _row(phase: Phase) -> str:
    def count(names: tuple[str, ...]) -> int:
        return sum(phase.anomalies.get(name, 0) for name in names)

    other = sum(phase.anomalies.values()) - count(COUNTED)
    settled = "never" if phase.settled is None else f"{phase.settled:.1f} s"
    return (
        f"{phase.name:<30}{phase.acknowledged:>8,}{phase.unknown:>8,}{count(LOST):>6}{count(DOUBLED):>8}"
        f"{count(SKIPPED):>8}{count(LEAKED):>7}{count(MOVED):>6}{other:>6}{phase.gone:>6}{phase.repaired:>9,}{phase.started_over:>7,}"
        f"{phase.unavailable:>6.2f} s{phase.median * 1000:>5.0f} ms{phase.p99 * 1000:>5.0f} ms"
        f"{settled:>9}{phase.peak / 2**20:>5.0f} MB"
    )
