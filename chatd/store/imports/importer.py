"""Runs an import: reads a source batch by batch, and counts what becomes of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sqlalchemy import Engine

from chatd.core.errors import OperatorError
from chatd.store.imports.converter import Converter
from chatd.store.imports.judge import Judge, Verdict
from chatd.store.imports.records import Problem, Record, Row, Source
from chatd.store.imports.target import Target
from chatd.store.upkeep.scans import looking

# Rows per transaction. A batch writes each page of an index once, so larger ones write less.
BATCH = 20_000
BATCH_CHARS = 16 * 1024 * 1024  # characters of content per transaction, which bound the memory

DISORDERED = "does not come after the row before: chatd numbers messages by their ids, so sort by id"


@dataclass
class Report:
    """Numbers of rows. `problems`: (column, kind) → [rows, place of the first]."""

    rows: int = 0
    fresh: int = 0
    there: int = 0
    problems: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    conversations: set[int] = field(default_factory=set)
    users: set[int] = field(default_factory=set)

    @property
    def bad(self) -> int:
        return sum(count for count, _ in self.problems.values())

    def note(self, problem: Problem, place: int) -> None:
        self.problems.setdefault((problem.column, problem.kind), [0, place])[0] += 1


Take = Callable[[list[Row]], Verdict]


class Importer:
    def __init__(
        self,
        source: Source,
        converter: Converter,
        *,
        tell: Callable[[int, float | None], None],
        skip: Callable[[Record, Problem], None] | None,
    ) -> None:
        """`tell` gets (rows read, share of the source) after each batch. `skip` gets each bad row; None: the
        first one ends the import.
        """
        self._source, self._converter = source, converter
        self._tell, self._skip = tell, skip
        self.report = Report()

    @property
    def noun(self) -> str:
        """What a place counts: lines or rows."""
        return self._source.noun

    @property
    def ignored(self) -> list[str]:
        return self._source.ignored

    def close(self) -> None:
        self._source.close()

    def check(self, engine: Engine) -> None:
        """Read everything and write nothing. All bad rows are counted, also if rows do not come in order."""
        judge = Judge()

        def take(rows: list[Row]) -> Verdict:
            with looking(engine) as connection:
                return judge(connection, rows)

        self._skip = self._skip or (lambda record, problem: None)
        self._run(take, ordered=False)

    def run(self, engine: Engine, guard: Callable[[], None]) -> None:
        """Write what chatd does not have yet. Calls `guard` before each transaction. Raises OperatorError."""
        judge, target = Judge(), Target()

        def take(rows: list[Row]) -> Verdict:
            guard()
            with engine.begin() as connection:
                verdict = judge(connection, rows)
                if verdict.refused and self._skip is None:
                    row, problem = verdict.refused[0]
                    raise self._stop(row.record, problem)
                if verdict.fresh:
                    target.write(connection, verdict.fresh)
                return verdict

        self._run(take, ordered=True)

    def _run(self, take: Take, *, ordered: bool) -> None:
        for rows in self._batches(ordered):
            verdict = take(rows)
            for row, problem in verdict.refused:
                self._refuse(row.record, problem)
            self.report.fresh += len(verdict.fresh)
            self.report.there += verdict.there
            self.report.conversations.update(row.conversation_id for row in rows)
            self.report.users.update(row.user_id for row in rows)
            self._tell(self.report.rows, self._source.share())

    def _batches(self, ordered: bool) -> Iterator[list[Row]]:
        rows: list[Row] = []
        newest = chars = 0
        for record in self._source.records():
            self.report.rows += 1
            try:
                row = self._converter.row(record)
                if row.id <= newest:
                    raise Problem("id", DISORDERED, row.id)
            except Problem as problem:
                if self._skip is None or (ordered and problem.kind == DISORDERED):
                    if rows:
                        yield rows  # what comes before the row that ends the import
                    raise self._stop(record, problem) from None
                self._refuse(record, problem)
                continue
            newest = row.id
            rows.append(row)
            chars += len(row.content or "") + len(row.meta or "")
            if len(rows) >= BATCH or chars >= BATCH_CHARS:
                yield rows
                rows, chars = [], 0
        if rows:
            yield rows

    def _refuse(self, record: Record, problem: Problem) -> None:
        if self._skip is None:
            raise self._stop(record, problem)
        self.report.note(problem, record.place)
        self._skip(record, problem)

    def _stop(self, record: Record, problem: Problem) -> OperatorError:
        done = self.report.fresh + self.report.there
        return OperatorError(
            f"{self._source.noun} {record.place}, {problem}.\n{done:,} rows are in chatd, the rest is not. Mend"
            " this row, or leave bad rows out with --skip-bad FILE. Then run the same command again: it goes on"
            " there."
        )
