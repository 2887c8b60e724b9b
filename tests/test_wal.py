"""SQLite's log stays small, whoever has read from it, and says so while it cannot."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.observe import metrics
from chatd.store import engine
from chatd.store.database import migrate, open_store, opened
from chatd.store.upkeep import wal
from tests.test_store import bench, post

KEPT = 1024 * 1024


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SQLITE_LOG_KEPT", KEPT)
    monkeypatch.setattr(wal, "SQLITE_LOG_KEPT", KEPT)
    monkeypatch.setattr(wal, "LARGE", 4 * KEPT)


async def test_the_log_is_small_again_when_a_reader_has_gone(tmp_path: Path) -> None:
    file, log = tmp_path / "chatd.db", tmp_path / "chatd.db-wal"
    async with bench(f"sqlite:///{file}") as b:
        assert b.store.wal is not None
        await b.do(post())
        reader = sqlite3.connect(file)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM chat_messages").fetchone()
        for _ in range(10):
            await b.do(*[post("x" * 8000) for _ in range(100)])
        with capture_logs() as said:
            await b.store.wal.look()
            await b.store.wal.look()
        assert log.stat().st_size > 4 * KEPT
        assert metrics.SQLITE_LOG._value.get() == log.stat().st_size
        assert [one["event"] for one in said] == ["sqlite_log_grows"], "once"
        reader.rollback()
        with capture_logs() as said:
            await b.store.wal.look()
        assert log.stat().st_size == 0
        assert [one["event"] for one in said] == ["sqlite_log_is_small"]
        assert (await b.do(post("after")))[0].seq == 1002
        reader.close()


async def test_the_log_is_seen_through_a_link(tmp_path: Path) -> None:
    """SQLite keeps it next to the file to which the link leads."""
    file, link = tmp_path / "disk" / "real.db", tmp_path / "chatd.db"
    file.parent.mkdir()
    link.symlink_to(file)
    async with bench(f"sqlite:///{link}") as b:
        assert b.store.wal is not None
        await b.do(post())
        await b.store.wal.look()
        assert metrics.SQLITE_LOG._value.get() == file.with_name("real.db-wal").stat().st_size > 0


async def test_a_writer_that_never_rests_cuts_it_too(tmp_path: Path) -> None:
    """When the log begins anew, only so much of its file stays."""
    file, log = tmp_path / "chatd.db", tmp_path / "chatd.db-wal"
    async with bench(f"sqlite:///{file}") as b:
        await b.do(post())
        with sqlite3.connect(file) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM chat_messages").fetchone()
            for _ in range(5):
                await b.do(*[post("x" * 8000) for _ in range(100)])
            assert log.stat().st_size > 3 * KEPT
        reader.close()
        for _ in range(3):
            await b.do(post("more"))
        assert log.stat().st_size <= KEPT


async def test_nobody_waits_for_it(tmp_path: Path) -> None:
    """While somebody else writes the log is left as it is."""
    file = tmp_path / "chatd.db"
    async with bench(f"sqlite:///{file}") as b:
        assert b.store.wal is not None
        for _ in range(3):
            await b.do(*[post("x" * 8000) for _ in range(100)])
        with sqlite3.connect(file, isolation_level=None) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            await b.store.wal.look()
            somebody.execute("ROLLBACK")
        somebody.close()
        assert (await b.do(post()))[0].seq == 301


@contextmanager
def full(file: Path) -> Iterator[None]:
    """The file cannot grow, as on a full disk. Its log can, until it is as large as the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(connection: sqlite3.Connection) -> None:
    """A file of 1 MiB, and a log with pages that make it larger."""
    connection.execute("CREATE TABLE filling (x)")
    connection.execute("INSERT INTO filling VALUES (randomblob(1048576))")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("INSERT INTO filling VALUES (randomblob(131072))")


async def test_a_full_disk_leaves_the_log_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends no task: the writer answers."""
    monkeypatch.setattr(wal, "SQLITE_LOG_KEPT", 0)
    file, log = tmp_path / "chatd.db", tmp_path / "chatd.db-wal"
    async with bench(f"sqlite:///{file}") as b:
        assert b.store.wal is not None
        with closing(sqlite3.connect(file, isolation_level=None)) as somebody:
            fill(somebody)
            with full(file):
                await b.store.wal.look()
                assert log.stat().st_size > 0
                assert (await b.do(post()))[0].seq == 1
            await b.store.wal.look()
            assert log.stat().st_size == 0


def test_chatd_starts_though_the_file_cannot_grow(tmp_path: Path) -> None:
    """The stamp of the start stays in the log, where SQLite finds it."""
    file = tmp_path / "chatd.db"
    config = Database(url=f"sqlite:///{file}")
    migrate(config)
    with closing(sqlite3.connect(file, isolation_level=None)) as somebody:
        fill(somebody)
        with full(file):
            open_store(config).close()
        assert somebody.execute("PRAGMA user_version").fetchone() == (1,)


def test_an_error_of_the_driver_is_told_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "chatd.db"
    config = Database(url=f"sqlite:///{file}")
    migrate(config)
    with closing(sqlite3.connect(file, isolation_level=None)) as somebody:
        fill(somebody)
        told = pytest.raises(OperatorError, match="disk I/O error")
        with full(file), told, opened(config) as writing, closing(writing.raw_connection()) as pooled:
            pooled.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
