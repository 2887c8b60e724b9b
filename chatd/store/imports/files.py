"""Reads the original table from a file: CSV with a line of names, or a JSON object on each line."""

from __future__ import annotations

import csv
import io
import itertools
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from chatd.core.errors import OperatorError
from chatd.store.imports.records import OPTIONAL, REQUIRED, Problem, Record

KNOWN = frozenset((*REQUIRED, *OPTIONAL))


class File:
    noun = "line"

    def __init__(self, path: Path | None, encoding: str) -> None:
        """`path` None: standard input. Raises OperatorError."""
        self._name = str(path) if path else "standard input"
        try:
            self._bytes = path.open("rb") if path else sys.stdin.buffer
            found = os.fstat(self._bytes.fileno())
        except OSError as error:
            raise OperatorError(f"{self._name}: {error.strerror}.") from None
        self._size = found.st_size if stat.S_ISREG(found.st_mode) else 0
        self._columns: set[str] = set()
        # A byte that is not in the encoding becomes a lone surrogate, so that the row that has it can be named.
        # utf-8-sig skips the mark that Windows writes first.
        chosen = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
        self._text = io.TextIOWrapper(self._bytes, chosen, errors="surrogateescape", newline="")

    @property
    def ignored(self) -> list[str]:
        return sorted(self._columns - KNOWN)

    def close(self) -> None:
        self._text.close()

    def share(self) -> float | None:
        return min(self._bytes.tell() / self._size, 1.0) if self._size else None

    def records(self) -> Iterator[Record]:
        try:
            first = self._text.readline()
            lines = itertools.chain([first] if first else [], self._text)
            if first.lstrip().startswith("["):
                raise OperatorError(
                    f"{self._name}: this is a JSON array. Write one object on each line instead."
                )
            yield from self._json(lines) if first.lstrip().startswith("{") else self._csv(lines)
        except OSError as error:
            raise OperatorError(f"{self._name}: {error.strerror}.") from error
        except UnicodeError as error:
            raise OperatorError(f"{self._name}: the file is not in this encoding ({error}).") from error

    def _json(self, lines: Iterator[str]) -> Iterator[Record]:
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = msgspec.json.decode(line)
            except (msgspec.DecodeError, ValueError, RecursionError):
                yield Record(place, {"line": line.rstrip("\n")}, Problem("", "is not JSON in UTF-8"))
                continue
            if not isinstance(values, dict):
                yield Record(place, {"line": values}, Problem("", "is not a JSON object"))
                continue
            self._columns = self._columns or set(values)
            yield Record(place, values)

    def _csv(self, lines: Iterator[str]) -> Iterator[Record]:
        # Strict: otherwise a quote that is escaped with a backslash would move the rest of its row.
        rows = csv.reader(lines, strict=True)
        names = self._names(rows)
        while True:
            place = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(place, {}, Problem("", f"is not CSV ({error})"))
                continue
            if len(fields) == len(names):
                yield Record(place, dict(zip(names, fields, strict=True)))
            elif fields:
                kind = "has not as many fields as the first line has names"
                yield Record(place, {"fields": fields}, Problem("", kind))

    def _names(self, rows: Iterator[list[str]]) -> list[str]:
        try:
            names = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise OperatorError(f"{self._name}: the first line is not CSV ({error}).") from None
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            raise OperatorError(
                f"{self._name}: the first line must name the columns, separated by commas, and it does not name"
                f" {', '.join(missing)}. chatd reads CSV, and files with a JSON object on each line."
            )
        self._columns = set(names)
        return names
