"""`import`: moves an existing chat into chatd."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from contextlib import ExitStack
from datetime import UTC, tzinfo
from pathlib import Path
from time import monotonic
from typing import Any
from zoneinfo import ZoneInfo

import click
import msgspec

from chatd import config
from chatd.cli.data import settings_of
from chatd.cli.group import main, with_config
from chatd.core.errors import OperatorError
from chatd.store import maintenance
from chatd.store.imports.converter import Converter
from chatd.store.imports.files import File
from chatd.store.imports.importer import Importer, Report
from chatd.store.imports.records import Problem, Record
from chatd.store.imports.tables import DatabaseTable

SAY_EVERY = 5.0  # seconds between two lines where nobody looks: in a log
PRIVATE = 0o600


class Zone(click.ParamType[tzinfo]):
    name = "zone"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tzinfo:
        if isinstance(value, tzinfo) or value == "UTC":
            return value if isinstance(value, tzinfo) else UTC
        try:
            return ZoneInfo(value)
        except (ValueError, OSError, KeyError):
            self.fail(f"{value!r} is not a time zone. Write a name like Asia/Ho_Chi_Minh.", param, ctx)


class Encoding(click.ParamType[str]):
    name = "encoding"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            codecs.lookup(value)
        except LookupError:
            self.fail(f"{value!r} is not an encoding. Write a name like utf-8 or cp1252.", param, ctx)
        return str(value)


@main.command("import")
@click.argument("source")
@click.option(
    "--table", default="chat_messages", help="The table, if SOURCE is a database; chat_messages by default."
)
@click.option(
    "--timezone", "zone", type=Zone(), default="UTC", help="The zone of dates that name none; UTC by default."
)
@click.option(
    "--encoding",
    type=Encoding(),
    default="utf-8",
    help="How SOURCE is written, if it is a file; UTF-8 by default.",
)
@click.option("--dry-run", is_flag=True, help="Read everything, report every kind of problem, write nothing.")
@click.option(
    "--skip-bad",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Leave bad rows out, and write them to this file. Otherwise the first one ends the import.",
)
@with_config
def import_(
    path: Path | None,
    source: str,
    table: str,
    zone: tzinfo,
    encoding: str,
    dry_run: bool,
    skip_bad: Path | None,
) -> None:
    """Move an existing chat into chatd. Stop chatd first; a dry run may go beside it.

    SOURCE is a CSV file whose first line names the columns, a file with a JSON object on each line, - for
    standard input, or the URL of a database: sqlite:///old.db, postgresql://…, mysql://… (with a driver).
    The columns are those of the original table chat_messages, and the rows come in the order of their ids.

    Ids and dates stay as they are. If you stop it, run the same command again: it goes on where it ended.
    Exit codes: 0 all rows are in chatd; 1 not all.
    """
    settings = settings_of(path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = Progress()
    with ExitStack() as stack:
        skip = stack.enter_context(BadRows(skip_bad, source)) if skip_bad else None

        def importer() -> Importer:
            opened = _opened(source, table, encoding, settings.database)
            limits = settings.limits
            converter = Converter(zone, limits.content_chars, limits.meta_bytes, encoding)
            one = Importer(opened, converter, tell=progress, skip=skip)
            progress.report = one.report
            return one

        try:
            done = maintenance.import_messages(settings.database, importer, dry=dry_run)
        except KeyboardInterrupt:
            progress.end()
            raise OperatorError(_interrupted(progress.report, dry_run)) from None
        finally:
            progress.end()
    if done.ignored:
        click.echo(f"These columns are not imported: {', '.join(done.ignored)}.", err=True)
    for line in _told(done.report, done.noun, monotonic() - progress.began, dry_run, skip_bad):
        click.echo(line)
    sys.exit(bool(done.report.bad))


def _opened(source: str, table: str, encoding: str, database: config.Database) -> File | DatabaseTable:
    if "://" not in source:
        return File(None if source == "-" else Path(source), encoding)
    found = DatabaseTable(source, table)
    if found.is_at(database.url):
        raise OperatorError("SOURCE is the database of chatd itself. Name the one that holds the old table.")
    return found


class BadRows:
    """Writes bad rows to a file that its owner alone can read, one JSON object a line."""

    def __init__(self, path: Path, source: str) -> None:
        if path.exists() and "://" not in source and Path(source).exists() and path.samefile(source):
            raise OperatorError("--skip-bad names SOURCE itself. Name another file.")
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "w")
        except OSError as error:
            raise OperatorError(f"{path}: {error.strerror}.") from error

    def __enter__(self) -> BadRows:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __call__(self, record: Record, problem: Problem) -> None:
        where = {"place": record.place, "column": problem.column, "problem": str(problem)}
        row = {name: _clean(value) for name, value in record.values.items()}
        self._file.write(msgspec.json.encode(where | {"row": row}).decode() + "\n")


def _clean(value: Any) -> Any:
    """Without the lone surrogates that stand for bytes which could not be decoded."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


class Progress:
    """Rows, rows per second, time left: a line that is written over, or lines now and then for a log."""

    def __init__(self) -> None:
        self.began = self._said = monotonic()
        self.report = Report()
        self._shown = False

    def __call__(self, rows: int, share: float | None) -> None:
        now = monotonic()
        passed = max(now - self.began, 0.001)
        left = f", {_duration(passed / share - passed)} left" if share else ""
        line = f"{rows:,} rows, {rows / passed:,.0f} rows/s{left}"
        if sys.stderr.isatty():
            self._shown = True
            click.echo(f"\r\033[K{line}", nl=False, err=True)
        elif now - self._said >= SAY_EVERY:
            self._said = now
            click.echo(line, err=True)

    def end(self) -> None:
        if self._shown:
            self._shown = False
            click.echo("\r\033[K", nl=False, err=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _told(report: Report, noun: str, seconds: float, dry: bool, skipped: Path | None) -> list[str]:
    rooms, users = len(report.conversations), len(report.users)
    lines = [f"{report.rows:,} rows: {rooms:,} conversations, {users:,} users."]
    if dry:
        lines += [f"{report.fresh:,} rows would be imported, {report.there:,} are in chatd already."]
    elif report.fresh:
        there = f"; {report.there:,} were in chatd already" if report.there else ""
        lines += [f"Imported {report.fresh:,} messages in {seconds:.1f} s{there}."]
    else:
        lines += [f"Nothing to import: {report.there:,} rows are in chatd already."]
    if report.bad:
        where = f", written to {skipped}" if skipped else ""
        lines += [f"{report.bad:,} rows are bad{where}:"]
    for (column, kind), (count, first) in sorted(report.problems.items(), key=lambda one: one[1][1]):
        lines += [f"  {count:,} × {column or 'the row'} {kind}; first in {noun} {first}"]
    return lines


def _interrupted(report: Report, dry: bool) -> str:
    if dry:
        return f"Stopped after {report.rows:,} rows. A dry run writes nothing."
    done = report.fresh + report.there
    return f"Stopped: {done:,} rows are in chatd. Run the same command again: it goes on there."
