"""Moving an existing chat into chatd: sources, bad rows, a kill in the middle, and what clients see then."""

from __future__ import annotations

import csv
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
import trio
from sqlalchemy import create_engine, text

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.core.limits import MAX_ID
from chatd.store import maintenance, urls
from chatd.store.database import migrate
from chatd.store.imports import importer, tables
from chatd.store.imports.converter import Converter
from chatd.store.imports.files import File
from chatd.store.imports.importer import Importer
from chatd.store.imports.moments import moment
from chatd.store.imports.records import OPTIONAL, REQUIRED, Problem, Record
from chatd.store.imports.tables import DatabaseTable
from tests.client import login
from tests.daemon import Daemon
from tests.services import PostgresServer

pytestmark = pytest.mark.service

COLUMNS = (*REQUIRED, *OPTIONAL)
ROOMS, USERS = 7, 11
PATIENCE = 60.0  # seconds
SKIPPED: list[tuple[int, str]] = []


def row(id: int, **fields: Any) -> dict[str, Any]:
    """A row of the original table."""
    moment = f"2024-01-02 {id // 3600 % 24:02}:{id // 60 % 60:02}:{id % 60:02}"
    one = dict.fromkeys(COLUMNS) | {"id": id, "chat_conversation_id": id % ROOMS + 1, "user_id": id % USERS + 1}
    return (
        one | {"type": "text", "content": f"message {id}", "created_at": moment, "updated_at": moment} | fields
    )


def rows(count: int, first: int = 1) -> list[dict[str, Any]]:
    return [row(id) for id in range(first, first + count)]


def as_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def imported(
    url: str, source: str | Path, *, dry: bool = False, skip: bool = False, zone: tzinfo = UTC
) -> importer.Report:
    SKIPPED.clear()

    def make() -> Importer:
        opened = (
            DatabaseTable(str(source), "chat_messages") if "://" in str(source) else File(Path(source), "utf-8")
        )
        leave_out = (lambda record, problem: SKIPPED.append((record.place, str(problem)))) if skip else None
        return Importer(opened, Converter(zone, 8000, 8192), tell=lambda rows, share: None, skip=leave_out)

    return maintenance.import_messages(Database(url=url), make, dry=dry).report


@pytest.fixture
def fresh(database_url: str) -> str:
    """A database of chatd without messages: SQLite, then PostgreSQL."""
    migrate(Database(url=database_url))
    return database_url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/chatd.db"
    migrate(Database(url=url))
    return url


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "BATCH", 10)


def query(url: str, sql: str) -> list[tuple[Any, ...]]:
    engine = create_engine(urls.parse(url))
    try:
        with engine.connect() as connection:
            return [tuple(one) for one in connection.execute(text(sql))]
    finally:
        engine.dispose()


def assert_whole(url: str, count: int) -> None:
    """What holds of every database of chatd: seq 1, 2, 3 … in the order of ids, a log that fits, heads."""
    found = query(url, "SELECT chat_conversation_id, seq, id FROM chat_messages ORDER BY id")
    assert len(found) == count
    numbered: dict[int, int] = {}
    for room, seq, _ in found:
        numbered[room] = numbered.get(room, 0) + 1
        assert seq == numbered[room]
    log = query(url, "SELECT conversation_id, seq, message_id FROM chat_changes WHERE kind = 'created'")
    assert sorted(log) == sorted(found)
    assert query(url, "SELECT count(*) FROM chat_changes WHERE mark IS NULL") == [(0,)]
    heads = query(url, "SELECT id, last_seq, low_seq, marked_seq FROM chat_conversations ORDER BY id")
    assert heads == [(room, seq, 0, seq) for room, seq in sorted(numbered.items())]
    marks = "SELECT count(*) FROM chat_conversations r JOIN chat_changes c ON c.conversation_id = r.id"
    assert query(url, f"{marks} AND c.seq = r.last_seq AND c.mark = r.mark") == [(len(numbered),)]


# What is written.


def test_ids_dates_and_order_stay(fresh: str, tmp_path: Path) -> None:
    old = [
        row(3, meta='{"a": [1, 2.5]}', client_id="c-1", created_at="2019-05-06 07:08:09.123456"),
        row(10, reply_to=3, content='mehr\nZeilen, "so" – 👍', edited_at="2024-03-01 00:00:00"),
        row(11, deleted_at="2024-02-01 00:00:00", meta='{"secret": 1}'),
        row(12, type=None, content="", updated_at=None),
    ]
    report = imported(fresh, as_csv(tmp_path / "old.csv", old))
    assert (report.rows, report.fresh, report.there, report.bad) == (4, 4, 0, 0)
    assert_whole(fresh, 4)
    found = {
        one[0]: one[1:]
        for one in query(fresh, "SELECT id, type, content, reply_to, client_id FROM chat_messages")
    }
    assert found[3] == ("text", "message 3", None, "c-1")
    assert found[10] == ("text", 'mehr\nZeilen, "so" – 👍', 3, None)
    assert found[11] == ("text", None, None, None), "a deleted message has no content"
    assert found[12] == ("text", "", None, None)
    assert query(fresh, "SELECT count(*) FROM chat_messages WHERE meta IS NOT NULL") == [(1,)]
    [(created,)] = query(fresh, "SELECT created_at FROM chat_messages WHERE id = 3")
    assert str(created).startswith("2019-05-06 07:08:09.123456")
    [(active,)] = query(fresh, "SELECT updated_at FROM chat_conversations WHERE id = 5")
    assert str(active).startswith("2024-01-02 00:00:11"), "an inbox is sorted by the date of the last message"


def test_authors_become_members_and_who_is_banned_stays_so(fresh: str, tmp_path: Path) -> None:
    engine = create_engine(urls.parse(fresh))
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO chat_conversations (id, updated_at) VALUES (2, '2024-01-01 00:00:00')")
        )
        connection.execute(
            text(
                "INSERT INTO chat_members (conversation_id, user_id, state, updated_at)"
                " VALUES (2, 2, 'banned', '2024-01-01 00:00:00')"
            )
        )
    engine.dispose()
    imported(fresh, as_csv(tmp_path / "old.csv", rows(20)))
    pairs = sorted({(one["chat_conversation_id"], one["user_id"]) for one in rows(20)})
    states = query(fresh, "SELECT conversation_id, user_id, state FROM chat_members ORDER BY 1, 2")
    assert states == [(*pair, "banned" if pair == (2, 2) else "active") for pair in pairs]
    [(version,)] = query(fresh, "SELECT members_version FROM chat_conversations WHERE id = 2")
    assert version == len([pair for pair in pairs if pair[0] == 2]) - 1


@pytest.mark.usefixtures("small_batches")
def test_a_second_run_imports_nothing_and_a_longer_file_goes_on(fresh: str, tmp_path: Path) -> None:
    file = as_csv(tmp_path / "old.csv", rows(35))
    assert imported(fresh, file).fresh == 35
    again = imported(fresh, file)
    assert (again.fresh, again.there, again.bad) == (0, 35, 0)
    longer = imported(fresh, as_lines(tmp_path / "old.jsonl", rows(58)))
    assert (longer.fresh, longer.there) == (23, 35)
    assert_whole(fresh, 58)


def test_other_content_under_the_same_id_changes_nothing(fresh: str, tmp_path: Path) -> None:
    imported(fresh, as_csv(tmp_path / "old.csv", rows(5)))
    before = query(fresh, "SELECT * FROM chat_messages ORDER BY id")
    for change in ({"content": "other"}, {"user_id": 99}, {"created_at": "2020-01-01 00:00:00"},
                   {"deleted_at": "2024-05-05 00:00:00"}):  # fmt: skip
        changed = [one | (change if one["id"] == 4 else {}) for one in rows(6)]
        with pytest.raises(OperatorError, match="line 5, column id: '4' is that of another message"):
            imported(fresh, as_csv(tmp_path / "other.csv", changed))
        assert query(fresh, "SELECT * FROM chat_messages ORDER BY id") == before
    report = imported(fresh, tmp_path / "other.csv", skip=True)
    assert (report.fresh, report.there, report.bad, [place for place, _ in SKIPPED]) == (1, 4, 1, [5])


def test_what_happened_in_chatd_since_is_no_contradiction(fresh: str, tmp_path: Path) -> None:
    """Users have edited and deleted imported messages; an erased one must not come back."""
    file = as_csv(tmp_path / "old.csv", rows(5))
    imported(fresh, file)
    engine = create_engine(urls.parse(fresh))
    with engine.begin() as connection:
        connection.execute(text("UPDATE chat_messages SET content = 'edited' WHERE id = 2"))
        zero = (
            "x'00000000000000000000000000000000'"
            if fresh.startswith("sqlite")
            else "decode(repeat('00', 16), 'hex')"
        )
        connection.execute(text(f"UPDATE chat_messages SET content = NULL, request_hash = {zero} WHERE id = 3"))
    engine.dispose()
    assert imported(fresh, file).there == 5
    assert query(fresh, "SELECT content FROM chat_messages WHERE id IN (2, 3) ORDER BY id") == [
        ("edited",),
        (None,),
    ]


def test_an_older_row_does_not_come_after_a_newer_one(fresh: str, tmp_path: Path) -> None:
    imported(fresh, as_csv(tmp_path / "new.csv", [row(50, chat_conversation_id=1)]))
    elsewhere = as_csv(tmp_path / "elsewhere.csv", [row(49, chat_conversation_id=2)])
    assert imported(fresh, elsewhere).fresh == 1, "the order counts within a conversation"
    with pytest.raises(OperatorError, match="column id: '20' is lower than that of a message"):
        imported(fresh, as_csv(tmp_path / "old.csv", [row(20, chat_conversation_id=1)]))


def test_a_client_id_stays_unique(fresh: str, tmp_path: Path) -> None:
    old = [
        row(id, chat_conversation_id=1, user_id=1, client_id="same" if id in (1, 3) else None)
        for id in range(1, 5)
    ]
    report = imported(fresh, as_csv(tmp_path / "old.csv", old), skip=True)
    assert (report.fresh, SKIPPED) == (
        3,
        [(4, "column client_id: 'same' is that of another message of this user in this conversation")],
    )
    late = [row(9, chat_conversation_id=1, user_id=1, client_id="same")]
    with pytest.raises(OperatorError, match="client_id: 'same'"):
        imported(fresh, as_csv(tmp_path / "late.csv", late))


# Sources.


def test_all_sources_give_the_same(tmp_path: Path, postgres: PostgresServer) -> None:
    old = [one | {"meta": '{"n": 1}' if one["id"] % 2 else None} for one in rows(30)]
    sources = [
        as_csv(tmp_path / "old.csv", old),
        as_lines(tmp_path / "old.jsonl", [one | {"meta": json.loads(one["meta"] or "null")} for one in old]),
        as_lines(tmp_path / "texts.jsonl", old),
        sqlite_source(tmp_path / "old.db", old),
        postgres_source(postgres.create_database(), old),
    ]
    seen = []
    for number, source in enumerate(sources):
        url = f"sqlite:///{tmp_path}/{number}.db"
        migrate(Database(url=url))
        assert imported(url, source).fresh == 30
        seen.append(query(url, "SELECT * FROM chat_messages ORDER BY id"))
    assert all(one == seen[0] for one in seen)


def sqlite_source(file: Path, rows: list[dict[str, Any]]) -> str:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"CREATE TABLE chat_messages ({', '.join(COLUMNS)})")
        places = ", ".join("?" for _ in COLUMNS)
        values = [[one[name] for name in COLUMNS] for one in reversed(rows)]
        connection.executemany(f"INSERT INTO chat_messages VALUES ({places})", values)
    return f"sqlite:///{file}"


def postgres_source(url: str, rows: list[dict[str, Any]]) -> str:
    kinds = {"meta": "json", "type": "text", "content": "text", "client_id": "text"}
    columns = ", ".join(
        f"{name} {kinds.get(name, 'timestamp' if '_at' in name else 'bigint')}" for name in COLUMNS
    )
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE TABLE chat_messages ({columns})")
        places = ", ".join("%s" for _ in COLUMNS)
        values = [[one[name] for name in COLUMNS] for one in rows]
        connection.cursor().executemany(f"INSERT INTO chat_messages VALUES ({places})", values)
    return url


def test_a_mysql_without_a_driver_is_told_what_to_export() -> None:
    url = urls.parse("mysql://app:secret@db.example/shop")
    command = tables.export_command(url, "chat_messages")
    assert command.startswith("mysql --host=db.example --user=app --password --batch --raw --quick")
    assert command.endswith('FROM chat_messages ORDER BY id" > chat_messages.jsonl')
    assert "secret" not in command


def test_a_source_that_is_none_is_a_sentence(sqlite_url: str, tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "missing.csv"): "No such file",
        f"sqlite:///{tmp_path}/missing.db": "there is no such file",
        "redis://localhost/": "does not read redis://",
        str(
            as_csv(tmp_path / "few.csv", rows(1), ("id", "content"))
        ): "does not name chat_conversation_id, user_id",
        f"sqlite:///{tmp_path}/empty.db": "there is no table chat_messages",
    }
    with closing(sqlite3.connect(tmp_path / "empty.db")) as empty:
        empty.execute("CREATE TABLE other (id)")
    (tmp_path / "array.json").write_text("[{}]")
    cases[str(tmp_path / "array.json")] = "this is a JSON array"
    for source, sentence in cases.items():
        with pytest.raises(OperatorError, match=sentence):
            imported(sqlite_url, source)


# Dates, ids, and rows that are wrong.


@pytest.mark.parametrize(
    ("written", "zone", "stored"),
    [
        ("2024-01-02 03:04:05", UTC, "2024-01-02T03:04:05.000000Z"),
        ("2024-01-02 03:04:05.5", UTC, "2024-01-02T03:04:05.500000Z"),
        ("2024-07-02 03:04:05", ZoneInfo("Europe/Berlin"), "2024-07-02T01:04:05.000000Z"),
        ("2024-01-02T03:04:05.123456Z", ZoneInfo("Europe/Berlin"), "2024-01-02T03:04:05.123456Z"),
        ("2024-01-02 03:04:05+07", UTC, "2024-01-01T20:04:05.000000Z"),
        ("2024-01-02 03:04:05-03:30", UTC, "2024-01-02T06:34:05.000000Z"),
        ("2024-01-02", UTC, "2024-01-02T00:00:00.000000Z"),
    ],
)
def test_dates(written: str, zone: tzinfo, stored: str) -> None:
    assert moment(written, zone) == stored


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"id": "9f3c-uuid"}, "column id: '9f3c-uuid' is not an integer"),
        ({"user_id": None}, "column user_id: the value is missing"),
        ({"user_id": 1.5}, "column user_id: '1.5' is not an integer"),
        ({"user_id": True}, "column user_id: 'True' is not an integer"),
        ({"user_id": "1_000"}, "column user_id: '1_000' is not an integer"),
        ({"user_id": "9" * 5000}, "is not an integer"),
        ({"chat_conversation_id": 0}, "column chat_conversation_id: '0' is not an id from 1 to"),
        ({"chat_conversation_id": MAX_ID + 1}, "is not an id from 1 to"),
        ({"created_at": "0000-00-00 00:00:00"}, "column created_at: '0000-00-00 00:00:00' is a zero date"),
        ({"updated_at": "2024-00-10 00:00:00"}, "is a zero date"),
        ({"created_at": "2024-02-30 00:00:00"}, "is not a date like"),
        ({"created_at": "20240102030405"}, "is not a date like"),
        ({"created_at": 1700000000}, "is not a date like"),
        ({"created_at": None}, "column created_at: the value is missing"),
        ({"meta": "{half"}, "column meta: the value is not JSON"),
        ({"meta": {"a": "x" * 9000}}, "limits.meta_bytes"),
        ({"content": "x" * 8001}, "column content: the value has more than the 8,000 characters"),
        ({"content": "a\0b"}, "column content: the value holds a NUL character"),
        ({"content": "a\udce9b"}, "column content: the value holds bytes that are not UTF-8"),
        ({"content": 5}, "column content: '5' is not a text"),
        ({"type": "t" * 33}, "column type: .* has more than 32 characters"),
        ({"client_id": "c" * 65}, "column client_id: .* has more than 64 characters"),
        ({"reply_to": 20}, "column reply_to: '20' is not an earlier message"),
    ],
)
def test_a_wrong_value_is_named(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Problem, match=sentence):
        Converter(UTC, 8000, 8192).row(Record(1, row(20) | fields))


@pytest.mark.parametrize("null", ["", "\\N", "NULL", None])
def test_null_has_several_forms(null: str | None) -> None:
    empty = dict.fromkeys(("type", "meta", "updated_at", *OPTIONAL), null)
    found = Converter(UTC, 8000, 8192).row(Record(1, row(1, **empty)))
    assert (found.type, found.meta, found.updated_at) == ("text", None, found.created_at)
    assert [found.client_id, found.reply_to, found.edited_at, found.deleted_at] == [None] * 4


def broken_file(path: Path) -> Path:
    """Rows 1 to 9, of which lines 3, 5, 6 and 9 are bad."""
    as_csv(
        path, [one | {"created_at": "0000-00-00 00:00:00"} if one["id"] in (2, 8) else one for one in rows(9)]
    )
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"message", b"m\xe9ssage")
    lines[5] = b"5,too,few\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    return path


def test_a_dry_run_reports_every_kind_and_writes_nothing(fresh: str, tmp_path: Path) -> None:
    report = imported(fresh, broken_file(tmp_path / "old.csv"), dry=True)
    assert (report.rows, report.fresh, report.there, report.bad) == (9, 5, 0, 4)
    assert (len(report.conversations), len(report.users)) == (5, 5)
    places = {(column, kind.split()[0]): found for (column, kind), found in report.problems.items()}
    assert places == {("created_at", "is"): [2, 3], ("content", "holds"): [1, 5], ("", "has"): [1, 6]}
    assert query(fresh, "SELECT count(*) FROM chat_messages") == [(0,)]


def test_a_bad_row_ends_the_import_unless_it_is_left_out(fresh: str, tmp_path: Path) -> None:
    file = broken_file(tmp_path / "old.csv")
    with pytest.raises(OperatorError, match="line 3, column created_at: '0000-00-00 00:00:00' is a zero date"):
        imported(fresh, file)
    assert query(fresh, "SELECT id FROM chat_messages") == [(1,)], "what comes before it"
    assert imported(fresh, file, skip=True).fresh == 4
    assert [place for place, _ in SKIPPED] == [3, 5, 6, 9]
    assert_whole(fresh, 5)


def test_rows_that_are_not_sorted_are_never_left_out(sqlite_url: str, tmp_path: Path) -> None:
    file = as_csv(tmp_path / "old.csv", [*rows(3), row(2)])
    for skip in (False, True):
        with pytest.raises(OperatorError, match="line 5, column id: '2' does not come after the row before"):
            imported(sqlite_url, file, skip=skip)
    assert imported(sqlite_url, file, dry=True).bad == 1


def test_a_quote_with_a_backslash_spoils_no_other_row(sqlite_url: str, tmp_path: Path) -> None:
    file = as_csv(tmp_path / "old.csv", rows(4))
    file.write_text(file.read_text().replace("message 2", '"say \\"hi\\", twice"'))
    report = imported(sqlite_url, file, skip=True)
    assert (report.fresh, report.bad, SKIPPED[0][0]) == (3, 1, 3)


# The command, beside a daemon, and killed.


@pytest.fixture
def idle(tmp_path: Path, fresh: str) -> Iterator[Daemon]:
    """A daemon that does not run yet, with a migrated database."""
    daemon = Daemon(tmp_path, database__url=fresh, limits__sends_per_second=0)
    yield daemon
    daemon.close()


def test_the_command_says_what_it_does(idle: Daemon, tmp_path: Path) -> None:
    broken_file(tmp_path / "old.csv")
    dry = idle.command("import", "--dry-run", "old.csv")
    assert (dry.returncode, dry.stdout.splitlines()) == (
        1,
        [
            "9 rows: 5 conversations, 5 users.",
            "5 rows would be imported, 0 are in chatd already.",
            "4 rows are bad:",
            "  2 × created_at is a zero date of MySQL; first in line 3",
            "  1 × content holds bytes that are not utf-8; first in line 5",
            "  1 × the row has not as many fields as the first line has names; first in line 6",
        ],
    )
    done = idle.command("import", "--skip-bad", "bad.jsonl", "old.csv")
    assert done.returncode == 1
    assert "Imported 5 messages in " in done.stdout
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(one["place"], one["column"]) for one in bad] == [
        (3, "created_at"),
        (5, "content"),
        (6, ""),
        (9, "created_at"),
    ]
    assert (tmp_path / "bad.jsonl").stat().st_mode & 0o777 == 0o600
    itself = idle.command("import", "--skip-bad", "old.csv", "old.csv")
    assert (itself.returncode, itself.stderr) == (1, "--skip-bad names SOURCE itself. Name another file.\n")
    again = idle.command("import", "--skip-bad", "bad.jsonl", "old.csv")
    assert "Nothing to import: 5 rows are in chatd already." in again.stdout


class Running:
    """An import from standard input whose progress goes to a terminal. `until` waits for what it says."""

    def __init__(self, daemon: Daemon) -> None:
        self._terminal, theirs = os.openpty()
        self.process = subprocess.Popen(
            [*daemon.program(), "import", "-"],
            cwd=daemon.directory,
            env=daemon.environ,
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self.said = ""

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def until(self, words: str) -> None:
        while words not in self.said:
            ready, _, _ = select.select([self._terminal], [], [], PATIENCE)
            assert ready, f"it did not say {words!r}: {self.said}"
            self.said += os.read(self._terminal, 4096).decode()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        os.close(self._terminal)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on(idle: Daemon, fresh: str, tmp_path: Path, end: signal.Signals) -> None:
    """The first batch is committed; the second waits for the rest of standard input."""
    count = importer.BATCH + 5000
    file = as_csv(tmp_path / "old.csv", rows(count))
    lines = file.read_bytes().splitlines(keepends=True)
    running = Running(idle)
    running.write(b"".join(lines[: importer.BATCH + 2000]))
    running.until(f"{importer.BATCH:,} rows, ")
    running.process.send_signal(end)
    if end is signal.SIGINT:
        running.until(
            f"Stopped: {importer.BATCH:,} rows are in chatd. Run the same command again: it goes on there."
        )
    running.close()
    report = imported(fresh, file)
    assert (report.there, report.fresh) == (importer.BATCH, 5000)
    assert_whole(fresh, count)


def test_an_import_and_a_daemon_exclude_each_other(idle: Daemon, fresh: str, tmp_path: Path) -> None:
    file = as_csv(tmp_path / "old.csv", rows(10))
    idle.start()
    refused = idle.command("import", str(file))
    assert refused.returncode == 1
    assert "Stop chatd first, on all nodes" in refused.stderr
    assert idle.command("import", "--dry-run", str(file)).returncode == 0
    idle.stop()
    running = Running(idle)
    running.write(b"".join(file.read_bytes().splitlines(keepends=True)[:5]))  # and it waits for more
    if fresh.startswith("sqlite"):
        wait_until_claimed(tmp_path / "chatd.db")
        started = idle.command("serve")
        assert (started.returncode, "Traceback" in started.stderr) == (1, False), started.stderr
        assert "locked" in started.stderr
        running.close()
        assert running.process.returncode == 0
        assert_whole(fresh, 4)
    else:
        idle.start()
        running.close()
        assert running.process.returncode == 1, "a node has started meanwhile"
        assert query(fresh, "SELECT count(*) FROM chat_messages") == [(0,)]


def wait_until_claimed(file: Path) -> None:
    """Until nobody else can read SQLite's file."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=0)) as other:
                other.execute("SELECT count(*) FROM chat_messages")
        except sqlite3.OperationalError:
            return
    raise AssertionError("the import did not claim the database")


# What clients see.


async def test_a_client_pages_through_all_of_it(idle: Daemon, fresh: str, tmp_path: Path) -> None:
    """20,000 messages of one room, among others; then the chat goes on."""
    count = 21_000
    old = [row(id, chat_conversation_id=1 if id % 21 else 2) for id in range(1, count + 1)]
    expected = [one["id"] for one in old if one["chat_conversation_id"] == 1]
    assert len(expected) == 20_000
    await trio.to_thread.run_sync(imported, fresh, as_csv(tmp_path / "old.csv", old))
    await trio.to_thread.run_sync(idle.start)
    async with login(idle, 1, {"1": None, "2": 0}) as client:
        rooms = client.ready["rooms"]  # type: ignore[attr-defined]
        assert (rooms["1"]["seq"], rooms["1"]["recovered"], rooms["1"]["changes"]) == (20_000, True, [])
        assert (rooms["2"]["seq"], rooms["2"]["recovered"]) == (1000, False)
        assert rooms["2"]["changes"][-1]["id"] == count
        found: list[dict[str, Any]] = []
        more = True
        while more:
            before = {"before": found[0]["id"]} if found else {}
            page = await client.request("history", conversation_id=1, limit=100, **before)
            found, more = page["messages"] + found, page["has_more"]
        assert [one["id"] for one in found] == expected
        assert [one["seq"] for one in found] == list(range(1, 20_001))
        assert [one["content"] for one in found] == [f"message {id}" for id in expected]
        mark = rooms["1"]["mark"]
        posted = await trio.to_thread.run_sync(idle.post, 1, 1, "it goes on")
        assert (posted["id"], posted["seq"]) == (count + 1, 20_001)
        assert (await client.expect("message"))["id"] == count + 1
    async with login(idle, 1, {"1": {"after": 20_000, "mark": mark}}) as client:
        room = client.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert (room["recovered"], [one["seq"] for one in room["changes"]]) == (True, [20_001])
