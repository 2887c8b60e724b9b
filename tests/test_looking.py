"""Commands that only look leave a database as it is: they make none, migrate none, and turn no WAL on."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from chatd.config import Database
from chatd.store import maintenance
from chatd.store.database import migrate
from tests.daemon import Daemon

pytestmark = pytest.mark.service

LOOKING = [
    ("token", "5"),
    ("tail", "5"),
    ("user", "export", "5"),
    ("prune", "--older-than", "1", "--dry-run"),
    ("backup", "copy.db"),
    ("import", "--dry-run", "old.csv"),
    ("doctor",),
    ("check-config",),
]
# They change a database of chatd's, and none but that.
CHANGING = [
    ("prune", "--older-than", "1"),
    ("user", "erase", "5", "--yes", "--wait", "0"),
    ("import", "old.csv"),
    ("restore", "--new-epoch"),
]


def names(commands: list[tuple[str, ...]]) -> list[str]:
    return ["-".join(word for word in words if word.isalpha()) for words in commands]


def files_of(file: Path) -> dict[str, bytes]:
    """Without the empty ones that a reader of a WAL leaves."""
    return {one.name: one.read_bytes() for one in file.parent.glob(f"{file.name}*")}


@pytest.fixture
def idle(tmp_path: Path) -> Daemon:
    """A daemon that does not run, whose database is `db` in a directory of its own."""
    (tmp_path / "data").mkdir()
    return Daemon(tmp_path, database__url=f"sqlite:///{tmp_path}/data/db")


@pytest.mark.parametrize("command", LOOKING + CHANGING, ids=names(LOOKING + CHANGING))
def test_no_database_is_made(idle: Daemon, command: tuple[str, ...]) -> None:
    done = idle.command(*command)
    assert (done.returncode != 0) is (command != ("check-config",))
    assert "Traceback" not in done.stderr
    assert list((idle.directory / "data").iterdir()) == []


@pytest.mark.parametrize("command", LOOKING + CHANGING, ids=names(LOOKING + CHANGING))
def test_a_foreign_file_is_left_as_it_is(idle: Daemon, command: tuple[str, ...]) -> None:
    file = idle.directory / "data" / "db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE notes (text)")
    before = files_of(file)
    done = idle.command(*command)
    assert (done.returncode != 0) is (command != ("check-config",))
    assert "Traceback" not in done.stderr
    assert files_of(file) == before


# `tail` needs no more of it than `token`, and waits for a daemon.
NOT_TAIL = [command for command in LOOKING + CHANGING if command[0] != "tail"]


@pytest.mark.parametrize("command", NOT_TAIL, ids=names(NOT_TAIL))
def test_an_older_schema_is_not_migrated(idle: Daemon, command: tuple[str, ...]) -> None:
    """As it lies there before the new version has served from it. A token of it is as good as ever."""
    file = idle.directory / "data" / "db"
    migrate(Database(url=f"sqlite:///{file}"))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        with connection:
            connection.execute("DROP TABLE chat_client_ids")
            connection.execute("UPDATE alembic_version SET version_num = '0004'")
            connection.execute("INSERT OR REPLACE INTO chat_meta VALUES ('token_secret', 'x'), ('epoch', 'y')")
    before = files_of(file)
    done = idle.command(*command)
    assert "Traceback" not in done.stderr
    if command[0] == "token":
        assert done.returncode == 0
    if command[0] != "restore":
        assert files_of(file) == before
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0004",)


def test_what_only_looks_works_beside_a_daemon_and_on_postgresql(postgres_url: str) -> None:
    config = Database(url=postgres_url)
    assert list(maintenance.exported(config, 5)) == []
    assert maintenance.prune(config, maintenance.Rules(days=1), lambda *_: None, dry=True) == 0
