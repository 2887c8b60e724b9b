"""Backup and restore: made under load, put in place elsewhere; and the copies that an upgrade makes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio

from chatd.config import Database
from chatd.core.errors import ConfigError, OperatorError
from chatd.store.database import migrate, open_store
from chatd.store.upkeep import copies
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import PostgresServer

ROOMS = (1, 2, 3)


class Load:
    """Posts to the rooms in turn until it is told to stop; `acknowledged` is (room, seq, content)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.acknowledged: list[tuple[int, int, str]] = []
        self._stop = False

    def run(self) -> None:
        number = 0
        while not self._stop:
            number += 1
            room = ROOMS[number % len(ROOMS)]
            texts = [f"{number} {part}" for part in range(20)]
            batch = [{"conversation_id": room, "sender_id": 1, "content": one} for one in texts]
            answer = self._daemon.request("POST", "/api/ws/messages/batch", {"messages": batch})
            seqs = [result["seq"] for result in answer.json["results"]]
            self.acknowledged += [(room, seq, one) for seq, one in zip(seqs, texts, strict=True)]

    def stop(self) -> None:
        self._stop = True


def history(daemon: Daemon, room: int) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    page = ""
    while True:
        answer = daemon.get(f"/api/ws/conversations/{room}/messages?limit=100{page}").json
        found = [(room, one["seq"], one["content"]) for one in answer["messages"]] + found
        if not answer["has_more"]:
            return found
        page = f"&before={answer['messages'][0]['id']}"


def test_a_backup_under_load_restores_to_a_prefix(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons(limits__sends_per_second=0)
    load, copy = Load(daemon), tmp_path / "copy.db"
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(load.run)
        while len(load.acknowledged) < 1000 and not posting.done():
            pass
        before = list(load.acknowledged)
        made = daemon.command("backup", str(copy))
        after = list(load.acknowledged)
        load.stop()
        posting.result()
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith(f"{copy}: ")
    assert made.stdout.endswith("checked.\n")
    assert len(after) > len(before), "it went on meanwhile"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert_restored(daemons, copy, before, load.acknowledged)


def assert_restored(daemons: Daemons, copy: Path, before: Any, all: Any) -> None:
    """Elsewhere: everything that was acknowledged before the backup began, and of each room a prefix."""
    elsewhere = daemons()
    assert elsewhere.stop() == 0
    done = elsewhere.command("restore", str(copy))
    assert done.returncode == 0, done.stderr
    elsewhere.start()
    for room in ROOMS:
        found = history(elsewhere, room)
        written = sorted(one for one in all if one[0] == room)
        assert found == written[: len(found)], "seq 1 … n, each with its content"
        assert len(found) >= len([one for one in before if one[0] == room])


async def test_clients_start_over_after_a_restore(daemons: Daemons, tmp_path: Path) -> None:
    """They have seen messages that are not there any more, and others will have their numbers."""
    daemon = await trio.to_thread.run_sync(daemons)
    copy = tmp_path / "copy.db"
    daemon.post(1, 2, "before")
    assert (await trio.to_thread.run_sync(daemon.command, "backup", str(copy))).returncode == 0
    daemon.post(1, 2, "after, and lost")
    async with login(daemon, 1, {"1": None}) as client:
        ready = client.ready  # type: ignore[attr-defined]
        assert ready["rooms"]["1"]["seq"] == 2
    refused = await trio.to_thread.run_sync(daemon.command, "restore", str(copy))
    assert (refused.returncode, "stop it first" in refused.stderr) == (1, True), "chatd uses this database"
    await trio.to_thread.run_sync(daemon.stop)
    done = await trio.to_thread.run_sync(daemon.command, "restore", str(copy))
    assert done.returncode == 0, done.stderr
    kept = Path(done.stdout.split("The old database is now ")[1].removesuffix(".\n"))
    with closing(sqlite3.connect(daemon.directory / kept)) as old:
        assert old.execute("SELECT count(*) FROM chat_messages").fetchone() == (2,), "nothing is thrown away"
    await trio.to_thread.run_sync(daemon.start)
    daemon.post(1, 2, "another second one")
    async with login(daemon, 1, {"1": 2}, epoch=ready["epoch"]) as client:
        room = client.ready["rooms"]["1"]  # type: ignore[attr-defined]
        assert room["recovered"] is False
        assert [one["content"] for one in room["changes"]] == ["before", "another second one"]


def database(path: Path, rows: int = 1) -> Path:
    """One with so many conversations."""
    migrate(Database(url=f"sqlite:///{path}"))
    with closing(sqlite3.connect(path)) as connection, connection:
        moment = "2026-01-01 00:00:00.000000"
        connection.executemany(ADD, [(id, moment) for id in range(1, rows + 1)])
    return path


def rows_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM chat_conversations").fetchone()[0])


ADD = "INSERT INTO chat_conversations (id, updated_at) VALUES (?, ?)"


def test_a_bad_backup_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    file, copy = database(tmp_path / "chatd.db"), tmp_path / "copy"
    copies.copy(database(tmp_path / "other.db", 3000), copy)
    good, before = copy.read_bytes(), sorted(tmp_path.iterdir())
    with pytest.raises(OperatorError, match="already exists"):
        copies.copy(file, copy)
    for damage, sentence in DAMAGES:
        copy.write_bytes(good)
        damage(copy)
        with pytest.raises(OperatorError, match=sentence):
            copies.replace(file, copy)
    copy.touch()
    assert (rows_of(file), sorted(tmp_path.iterdir())) == (1, before)


def modes(directory: Path, pattern: str = "*") -> dict[str, str]:
    return {file.name: f"{file.stat().st_mode & 0o777:04o}" for file in directory.glob(pattern)}


@pytest.mark.service
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_database_and_its_copies_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    """It holds all messages and what signs tokens. Whatever the umask is."""
    daemon = Daemon(tmp_path)
    before = os.umask(umask)
    try:
        daemon.start()
        daemon.post(1, 7, "hello")
        assert modes(tmp_path, "chatd.db*") == dict.fromkeys(
            ["chatd.db", "chatd.db-shm", "chatd.db-wal"], "0600"
        )
        for arguments in (("backup", "copy.db"), ("user", "export", "7", "--output", "seven")):
            assert daemon.command(*arguments).returncode == 0
        daemon.stop()
        assert daemon.command("restore", "copy.db").returncode == 0
    finally:
        os.umask(before)
        daemon.close()
    found = modes(tmp_path)
    del found["log"]
    assert set(found) >= {"chatd.db", "copy.db", "seven"}
    assert any(name.startswith("chatd.db.before-restore") for name in found)
    assert set(found.values()) == {"0600"}, found


def test_a_database_that_others_can_read_is_closed_to_them(tmp_path: Path) -> None:
    """As older versions have made them. What a group alone may do somebody has wanted."""
    file = tmp_path / "chatd.db"
    migrate(Database(url=f"sqlite:///{file}"))
    file.chmod(0o644)
    migrate(Database(url=f"sqlite:///{file}"))
    assert modes(tmp_path)["chatd.db"] == "0600"
    file.chmod(0o660)
    migrate(Database(url=f"sqlite:///{file}"))
    assert modes(tmp_path)["chatd.db"] == "0660"


@pytest.mark.service
@pytest.mark.parametrize(
    "arguments",
    [("backup", "missing/"), ("user", "export", "7", "--output", "missing/")],
    ids=lambda one: one[0],
)
def test_no_file_gets_the_name_of_a_missing_directory(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    migrate(Database(url=f"sqlite:///{tmp_path / 'chatd.db'}"))
    ran = Daemon(tmp_path).command(*arguments)
    assert ran.returncode == 2
    assert "there is no directory missing/" in ran.stderr
    assert not (tmp_path / "missing").exists()


def test_nothing_is_left_of_an_interrupted_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = database(tmp_path / "chatd.db")
    partial = copies.partial_of(tmp_path / "copy.db")
    partial.write_text("of one that was killed")
    partial.with_name(f"{partial.name}-journal").write_text("of one that was killed")

    def interrupt(path: Path) -> str:
        assert (path, path.stat().st_mode & 0o777) == (partial, 0o600)
        assert rows_of(path) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(copies, "check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        copies.copy(file, tmp_path / "copy.db")
    assert list(tmp_path.iterdir()) == [file]


def test_no_log_of_another_database_is_played_into_a_restored_one(tmp_path: Path) -> None:
    """chatd was killed, and its file moved away by hand: SQLite goes by the name of a log alone."""
    file, log = database(tmp_path / "chatd.db"), tmp_path / "chatd.db-wal"
    copies.copy(file, tmp_path / "copy.db")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with connection:
            connection.execute(ADD, (7, "2026-01-01 00:00:00.000000"))
        left = log.read_bytes()
    assert rows_of(file) == 2
    file.unlink()
    log.write_bytes(left)
    assert copies.replace(file, tmp_path / "copy.db") is None
    assert rows_of(file) == 1
    (kept,) = tmp_path.glob("*before-restore*")
    assert kept.read_bytes() == left


def test_what_a_log_beside_a_backup_holds_is_restored(tmp_path: Path) -> None:
    """A copy of the files of a daemon that was killed, say."""
    source, file = database(tmp_path / "source.db"), database(tmp_path / "chatd.db")
    with closing(sqlite3.connect(source)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with connection:
            connection.execute(ADD, (7, "2026-01-01 00:00:00.000000"))
        kept = copies.replace(file, source)
    assert kept is not None
    assert (rows_of(file), rows_of(kept)) == (2, 1)


def test_a_daemon_that_begins_during_a_restore_loses_nothing(tmp_path: Path) -> None:
    """It has opened the old file, and is not allowed to write to it any more."""
    file = database(tmp_path / "chatd.db")
    copies.copy(file, tmp_path / "copy.db")
    with closing(sqlite3.connect(file, isolation_level=None)) as late:
        copies.replace(file, tmp_path / "copy.db")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            late.execute("PRAGMA journal_mode = WAL")


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(40_000)
        file.write(os.urandom(20_000))


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(b"no database" * 1000), "this is not a database of chatd"),
    (lambda path: path.write_bytes(b""), "this is not a database of chatd"),
    (Path.unlink, "this is not a database of chatd"),
    (spoil, "the file is damaged"),
    (lambda path: execute(path, "UPDATE alembic_version SET version_num = '9999'"), "version 9999, which"),
]


def test_postgresql_is_saved_by_its_own_tools(
    postgres: PostgresServer, daemons: Daemons, tmp_path: Path
) -> None:
    """As docs/backup.md has it."""
    url, other = postgres.create_database(), postgres.create_database()
    migrate(Database(url=url))
    daemon, copy = daemons(database__url=url), tmp_path / "chatd.dump"
    for number in range(5):
        daemon.post(1, 2, f"{number}")
    told = daemon.command("backup", str(copy))
    assert (told.returncode, "pg_dump --format=custom" in told.stderr) == (1, True)
    tools = postgres._binary.parent
    subprocess.run([tools / "pg_dump", "--format=custom", f"--file={copy}", url], check=True)
    subprocess.run([tools / "pg_restore", "--clean", "--if-exists", f"--dbname={other}", copy], check=True)
    elsewhere = Daemon(tmp_path, database__url=other)
    assert elsewhere.command("restore", "--new-epoch").returncode == 0
    epochs = [epoch_of(daemon)]
    try:
        elsewhere.start()
        assert history(elsewhere, 1) == history(daemon, 1)
        assert elsewhere.post(1, 2, "more")["seq"] == 6
        epochs.append(epoch_of(elsewhere))
    finally:
        elsewhere.close()
    assert len(set(epochs)) == 2


def epoch_of(daemon: Daemon) -> str:
    async def ask() -> str:
        async with login(daemon, 1, {}) as client:
            return str(client.ready["epoch"])  # type: ignore[attr-defined]

    return trio.run(ask)


# Upgrades.


def test_a_migration_of_sqlite_begins_with_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "chatd.db"
    config = Database(url=f"sqlite:///{file}")
    migrate(config)
    assert list(tmp_path.glob("*before*")) == [], "there was nothing to copy"
    # Back to what the version before had, as far as the next migration is concerned.
    for statement in (
        "ALTER TABLE chat_conversations DROP COLUMN removed_version",
        "DROP TABLE chat_client_ids",
        "DROP TABLE chat_removed_messages",
        "UPDATE alembic_version SET version_num = '0004'",
        "INSERT INTO chat_conversations (id, updated_at) VALUES (7, '2026-01-01T00:00:00.000000Z')",
    ):
        execute(file, statement)
    migrate(config)
    (copy,) = tmp_path.glob("*before*")
    assert copy.name == "chatd.db.before-0004-to-0005"
    with closing(sqlite3.connect(copy)) as old, closing(sqlite3.connect(file)) as new:
        versions = [one.execute("SELECT version_num FROM alembic_version").fetchone()[0] for one in (old, new)]
        assert versions == ["0004", "0005"]
        assert old.execute("SELECT id FROM chat_conversations").fetchall() == [(7,)]
    # Going back is a copy.
    shutil.copy(copy, file)
    with closing(sqlite3.connect(file)) as back:
        assert back.execute("SELECT version_num FROM alembic_version").fetchone() == ("0004",)


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = database(tmp_path / "chatd.db")
    execute(file, "UPDATE alembic_version SET version_num = '9999'")
    for use in (migrate, open_store):
        with pytest.raises(ConfigError) as refused:
            use(Database(url=f"sqlite:///{file}"))
        assert "version 9999, which this chatd does not know. Install the newer chatd" in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


def test_two_nodes_migrate_at_once(postgres: PostgresServer) -> None:
    config = Database(url=postgres.create_database())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: migrate(config), range(4)))
    assert sorted(found, key=str) == [("0005", "0005")] * 3 + [(None, "0005")]


def test_a_running_version_goes_on_when_the_next_one_migrates(
    postgres: PostgresServer, daemons: Daemons
) -> None:
    """Migrations only add, so that both serve side by side; but an older one does not start any more."""
    config = Database(url=postgres.create_database())
    migrate(config)
    daemon = daemons(database__url=config.url)
    daemon.post(1, 2, "before")
    with psycopg.connect(config.url, autocommit=True) as connection:
        connection.execute(NEXT_VERSION)
    assert daemon.post(1, 2, "after")["seq"] == 2
    assert [content for _, _, content in history(daemon, 1)] == ["before", "after"]
    assert daemon.get("/readyz").json["status"] == "ok"
    daemon.stop()
    started = daemon.command("serve")
    assert (started.returncode, "which this chatd does not know" in started.stderr) == (78, True)


NEXT_VERSION = """
ALTER TABLE chat_messages ADD COLUMN next_column TEXT;
ALTER TABLE chat_conversations ADD COLUMN next_column BIGINT NOT NULL DEFAULT 0;
CREATE TABLE chat_next (id BIGINT PRIMARY KEY);
UPDATE alembic_version SET version_num = '9999';
"""
