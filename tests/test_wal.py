"""SQLite's log stays small, whoever has read from it, and says so while it cannot."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chatd.observe import metrics
from chatd.store import engine
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
