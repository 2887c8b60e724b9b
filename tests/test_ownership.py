"""chatd refuses the database of another application, and leaves it exactly as it is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from chatd.config import Database
from chatd.core.errors import ConfigError
from chatd.store.database import migrate, open_store
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import PostgresServer

# What another application may have, by the table that chatd names.
FOREIGN = {
    "notes": "CREATE TABLE notes (text TEXT)",
    "chat_messages": "CREATE TABLE chat_messages (id INTEGER PRIMARY KEY, body TEXT)",
    "orders": """
        CREATE TABLE orders (id INTEGER PRIMARY KEY);
        CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL);
        INSERT INTO alembic_version VALUES ('8f2c1d');
    """,
    "chat_conversations": """
        CREATE TABLE chat_conversations (id INTEGER PRIMARY KEY, title TEXT);
        CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL);
        INSERT INTO alembic_version VALUES ('0005');
    """,
}


def foreign_file(directory: Path, script: str, journal_mode: str = "delete") -> Path:
    file = directory / "theirs.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.executescript(script)
    file.chmod(0o644)
    return file


def state_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {one.name: (one.stat().st_mode, one.read_bytes()) for one in directory.iterdir()}


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
@pytest.mark.parametrize("table", FOREIGN)
def test_a_foreign_file_is_refused_and_stays_as_it_is(tmp_path: Path, table: str, journal_mode: str) -> None:
    file = foreign_file(tmp_path, FOREIGN[table], journal_mode)
    before = state_of(tmp_path)
    assert list(before) == ["theirs.db"]
    for use in (open_store, migrate):
        with pytest.raises(ConfigError) as refused:
            use(Database(url=f"sqlite:///{file}"))
        assert f"{file} belongs to another application" in str(refused.value)
        assert table in str(refused.value)
    assert state_of(tmp_path) == before


def test_a_foreign_file_that_is_in_use_is_refused(tmp_path: Path) -> None:
    """Its application has not yet moved the table from its log into the file."""
    file = foreign_file(tmp_path, "", "wal")
    with closing(sqlite3.connect(file, isolation_level=None)) as theirs:
        theirs.execute(FOREIGN["notes"])
        before = file.read_bytes(), file.with_name("theirs.db-wal").read_bytes()
        with pytest.raises(ConfigError, match="notes"):
            open_store(Database(url=f"sqlite:///{file}"))
        assert (file.read_bytes(), file.with_name("theirs.db-wal").read_bytes()) == before
        theirs.execute("INSERT INTO notes VALUES ('still ours')")


@pytest.mark.parametrize("content", ["missing", "empty", "no tables"])
def test_a_free_file_becomes_chatds(tmp_path: Path, content: str) -> None:
    file = tmp_path / "chatd.db"
    if content != "missing":
        file.touch()
    if content == "no tables":
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("VACUUM")
    for _ in range(2):
        open_store(Database(url=f"sqlite:///{file}")).close()


@pytest.mark.service
def test_serve_says_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = foreign_file(tmp_path / "data", FOREIGN["chat_messages"])
    before = state_of(tmp_path / "data")
    ended = Daemon(tmp_path, database__url=f"sqlite:///{file}").command("serve")
    assert ended.returncode == 78
    _, sentence = ended.stderr.splitlines()
    assert "theirs.db belongs to another application" in sentence
    assert "name another file" in sentence
    assert state_of(tmp_path / "data") == before


def tables_of(url: str) -> list[tuple[str, ...]]:
    query = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
    with psycopg.connect(url) as connection:
        return sorted(connection.execute(query).fetchall())


@pytest.mark.parametrize("table", ["chat_messages", "orders", "chat_conversations"])
def test_a_foreign_postgresql_is_refused_and_stays_as_it_is(
    postgres: PostgresServer, tmp_path: Path, table: str
) -> None:
    url = postgres.create_database()
    with psycopg.connect(url) as connection:
        connection.execute(FOREIGN[table])
    before = tables_of(url)
    daemon = Daemon(tmp_path, database__url=url)
    for command in ("serve", "migrate"):
        ended = daemon.command(command)
        assert ended.returncode == 78
        _, sentence = ended.stderr.splitlines()
        assert "belongs to another application" in sentence
        assert table in sentence
        assert "create a database for chatd" in sentence
    assert tables_of(url) == before


def test_a_postgresql_with_other_tables_may_be_shared(postgres: PostgresServer, daemons: Daemons) -> None:
    """The backend's, say: no name is taken twice."""
    url = postgres.create_database()
    with psycopg.connect(url) as connection:
        connection.execute(FOREIGN["notes"])
    migrate(Database(url=url))
    assert daemons(database__url=url).get("/readyz").status == 200
