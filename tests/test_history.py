"""The database goes back in time: a cursor proves that it is of this history, and nobody is moved to another
one without a word. Nobody whose history is intact is told to start over.

Here with SQLite files that are put back, and with a database that is rewound under a running daemon.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import create_engine, text

from chatd.config import Database
from chatd.store.database import migrate, open_store
from tests.client import Client, Event, login
from tests.conftest import Daemons
from tests.daemon import Daemon

NOTICED = 15.0  # seconds; a file that is another one is noticed within two, and two are for goodbyes
SWEEP = 10.0  # seconds; what nobody tells is found within one
KEPT, SEEN = 5, 10  # the conversation goes back to the first; a client had seen the second
REWIND = (
    "DELETE FROM chat_changes WHERE conversation_id = 1 AND seq > 5",
    "DELETE FROM chat_messages WHERE chat_conversation_id = 1 AND seq > 5",
    "UPDATE chat_conversations SET last_seq = 5, marked_seq = 5,"
    " mark = (SELECT mark FROM chat_changes WHERE conversation_id = 1 AND seq = 5) WHERE id = 1",
)


async def post(daemon: Daemon, count: int, what: str, conversation: int = 1) -> None:
    for number in range(count):
        await trio.to_thread.run_sync(daemon.post, conversation, 9, f"{what} {number}")


def contents(changes: list[Event]) -> list[str]:
    return [change["content"] for change in changes]


async def place_of(daemon: Daemon, since: Any, **fields: Any) -> Event:
    """What a client is told that comes back to conversation 1."""
    async with login(daemon, 1, {"1": since}, **fields) as client:
        return dict(client.ready["rooms"]["1"])  # type: ignore[attr-defined]


# A database that is rewound under a running daemon. Clients stay.


class Rewound:
    """A daemon, and its database from outside."""

    def __init__(self, daemon: Daemon, url: str) -> None:
        self.daemon = daemon
        self._engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))

    def execute(self, *statements: str) -> None:
        with self._engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture
def rewound(database_url: str, daemons: Daemons) -> Iterator[Rewound]:
    migrate(Database(url=database_url))
    one = Rewound(daemons(database__url=database_url), database_url)
    yield one
    one.close()


async def heard_all(client: Client) -> list[Event]:
    heard = await client.messages(SEEN)
    assert [event["seq"] for event in heard] == list(range(1, SEEN + 1))
    return heard


async def test_a_client_that_stays_is_told_when_another_history_begins(rewound: Rewound) -> None:
    """At once, by the first change of the new history, though it has a number that was used before."""
    async with login(rewound.daemon, 1, {"1": None, "2": None}) as ada:
        await post(rewound.daemon, SEEN, "lost")
        await heard_all(ada)
        await trio.to_thread.run_sync(rewound.execute, *REWIND)
        await post(rewound.daemon, 1, "found")
        told = await ada.expect("subscribed", patience=3.0)
        assert (told["conversation_id"], told["recovered"], told["seq"]) == (1, False, KEPT + 1)
        assert contents(told["changes"]) == [*(f"lost {n}" for n in range(KEPT)), "found 0"]
        await post(rewound.daemon, 1, "elsewhere", conversation=2)
        await post(rewound.daemon, 6, "live")
        assert (await ada.expect("message", conversation_id=2))["seq"] == 1
        live = await ada.messages(6)
        assert [(m["seq"], m["content"]) for m in live] == [(7 + n, f"live {n}") for n in range(6)]
        await ada.silence()


async def test_a_client_that_stays_is_told_though_nobody_posts(rewound: Rewound) -> None:
    async with login(rewound.daemon, 1, {"1": None}) as ada:
        await post(rewound.daemon, SEEN, "lost")
        await heard_all(ada)
        await trio.to_thread.run_sync(rewound.execute, *REWIND)
        told = await ada.expect("subscribed", patience=SWEEP + 3)
        assert (told["recovered"], told["seq"]) == (False, KEPT)
        await post(rewound.daemon, 1, "found")
        assert (await ada.expect("message"))["seq"] == KEPT + 1


async def test_a_client_that_stays_is_told_when_the_new_history_has_passed_it(rewound: Rewound) -> None:
    """Nobody tells this node of it: what another one committed, say, and Redis lost."""
    grown = [
        "UPDATE chat_changes SET mark = 'another' WHERE conversation_id = 1 AND seq > 5",
        "UPDATE chat_conversations SET mark = 'another' WHERE id = 1",
    ]
    async with login(rewound.daemon, 1, {"1": None}) as ada:
        await post(rewound.daemon, SEEN, "same numbers")
        await heard_all(ada)
        await trio.to_thread.run_sync(rewound.execute, *grown)
        await post(rewound.daemon, 1, "follows another change")
        told = await ada.expect("subscribed", patience=3.0)
        assert (told["recovered"], told["seq"]) == (False, SEEN + 1)
        await ada.silence()


async def test_a_conversation_that_has_gone_is_told(rewound: Rewound) -> None:
    """The database is from before the conversation began."""
    gone = [
        "DELETE FROM chat_changes",
        "DELETE FROM chat_messages",
        "DELETE FROM chat_members",
        "DELETE FROM chat_conversations",
    ]
    async with login(rewound.daemon, 1, {"1": None}) as ada:
        await post(rewound.daemon, SEEN, "lost")
        await heard_all(ada)
        await trio.to_thread.run_sync(rewound.execute, *gone)
        await post(rewound.daemon, 1, "first again")
        told = await ada.expect("subscribed", patience=3.0)
        assert (told["recovered"], told["seq"], contents(told["changes"])) == (False, 1, ["first again 0"])


async def test_who_comes_back_meanwhile_is_of_the_new_history(rewound: Rewound) -> None:
    """It enters a room that still stands in the old one: what follows is not taken for what it has."""
    async with login(rewound.daemon, 1, {"1": None}) as ada:
        await post(rewound.daemon, SEEN, "lost")
        heard = await heard_all(ada)
        await trio.to_thread.run_sync(rewound.execute, *REWIND)
        since = {"after": KEPT, "mark": heard[KEPT - 1]["mark"]}
        async with login(rewound.daemon, 2, {"1": since}) as grace:
            place = grace.ready["rooms"]["1"]  # type: ignore[attr-defined]
            assert (place["recovered"], place["seq"], place["mark"]) == (True, KEPT, since["mark"])
            # Her answer shows the node that its room is ahead of the database.
            assert (await ada.expect("subscribed", patience=3.0))["recovered"] is False
            again = await grace.expect("subscribed", patience=3.0)
            assert (again["recovered"], again["changes"]) == (True, [])
            await post(rewound.daemon, 2, "found")
            for client in (ada, grace):
                assert [m["seq"] for m in await client.messages(2)] == [KEPT + 1, KEPT + 2]


# Files that are put back.


class Files:
    """A daemon with an SQLite file, and copies of it made while it is stopped."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.file, self.copy = directory / "chatd.db", directory / "copy.db"
        self.moved = directory / "moved.db"

    async def stop(self) -> None:
        assert await trio.to_thread.run_sync(self.daemon.stop) == 0
        assert not self.file.with_name("chatd.db-wal").exists()

    async def start(self) -> None:
        await trio.to_thread.run_sync(self.daemon.start)

    async def set_aside(self) -> None:
        await self.stop()
        shutil.copy(self.file, self.copy)
        await self.start()

    async def put_back(self) -> None:
        """With `cp`, or as a snapshot of the whole machine does it."""
        await self.stop()
        shutil.copy(self.copy, self.file)
        await self.start()


@pytest.fixture
def files(daemons: Daemons, tmp_path: Path) -> Files:
    return Files(daemons(database__url=f"sqlite:///{tmp_path}/chatd.db"), tmp_path)


@pytest.fixture
def linked(daemons: Daemons, tmp_path: Path) -> Files:
    """`database.url` names a link to the file, which is in another directory."""
    link, disk = tmp_path / "link.db", tmp_path / "disk"
    disk.mkdir()
    link.symlink_to(disk / "chatd.db")
    return Files(daemons(database__url=f"sqlite:///{link}"), disk)


async def lose_half(files: Files) -> tuple[list[Event], str]:
    """All that a client has heard, and the epoch. The database has the first half of it."""
    async with login(files.daemon, 1, {"1": None}) as ada:
        await post(files.daemon, KEPT, "kept")
        heard = await ada.messages(KEPT)
        epoch = ada.ready["epoch"]  # type: ignore[attr-defined]
    await files.set_aside()
    async with login(files.daemon, 1, {"1": KEPT}) as ada:
        await post(files.daemon, SEEN - KEPT, "lost")
        heard += await ada.messages(SEEN - KEPT)
    await files.put_back()
    return heard, epoch


def since(change: Event) -> dict[str, Any]:
    return {"after": change["seq"], "mark": change["mark"]}


async def test_a_cursor_with_a_mark_proves_itself_when_a_file_was_put_back(files: Files) -> None:
    """Before the new history has passed the cursor, and after; for who has seen too much, and who has not."""
    heard, epoch = await lose_half(files)
    for passed in (False, True):
        if passed:
            await post(files.daemon, SEEN, "found")
        head = KEPT + passed * SEEN
        for change in heard:
            place = await place_of(files.daemon, since(change), epoch=epoch)
            intact = change["seq"] <= KEPT
            assert (place["recovered"], place["seq"]) == (intact, head), change["seq"]
            if intact:
                assert [c["seq"] for c in place["changes"]] == list(range(change["seq"] + 1, head + 1))


async def test_what_an_integer_is_worth_when_a_file_was_put_back(files: Files) -> None:
    """Old clients start over beyond the head. Below it they are unprotected: the epoch went back too."""
    heard, epoch = await lose_half(files)
    for fields in ({"epoch": epoch}, {}):
        assert (await place_of(files.daemon, SEEN, **fields))["recovered"] is False
        assert (await place_of(files.daemon, KEPT, **fields))["recovered"] is True
    await post(files.daemon, SEEN, "found")
    for fields in ({"epoch": epoch}, {}):
        assert (await place_of(files.daemon, SEEN, **fields))["recovered"] is True
    assert heard


async def test_restore_protects_integers_with_an_epoch_and_spares_marks(files: Files) -> None:
    """`chatd restore` makes a new epoch: who has no mark starts over, who has one proves itself."""
    heard, epoch = await lose_half(files)
    await files.stop()
    done = await trio.to_thread.run_sync(files.daemon.command, "restore", str(files.copy))
    assert done.returncode == 0, done.stderr
    await files.start()
    await post(files.daemon, SEEN, "found")
    assert (await place_of(files.daemon, SEEN, epoch=epoch))["recovered"] is False
    assert (await place_of(files.daemon, KEPT, epoch=epoch))["recovered"] is False
    assert (await place_of(files.daemon, since(heard[SEEN - 1]), epoch=epoch))["recovered"] is False
    place = await place_of(files.daemon, since(heard[KEPT - 1]), epoch=epoch)
    assert (place["recovered"], len(place["changes"])) == (True, SEEN)


async def test_subscribe_takes_a_mark_too(files: Files) -> None:
    heard, _ = await lose_half(files)
    async with login(files.daemon, 1) as ada:
        for change, recovered in ((heard[KEPT - 1], True), (heard[SEEN - 1], False)):
            told = await ada.request("subscribe", conversation_id=1, **since(change))
            assert (told["recovered"], told["seq"], told["mark"]) == (recovered, KEPT, heard[KEPT - 1]["mark"])
        told = await ada.request("subscribe", conversation_id=1, after=KEPT, mark="x" * 8)
        assert told["recovered"] is False
        told = await ada.request("subscribe", conversation_id=1, after=KEPT, mark=None)
        assert told["recovered"] is True
        empty = await ada.request("subscribe", conversation_id=2)
        assert (empty["seq"], empty["mark"]) == (0, None)


# Files that go away under a running daemon.


def last_seq(file: Path) -> int:
    with closing(sqlite3.connect(file)) as database:
        return int(database.execute("SELECT last_seq FROM chat_conversations").fetchone()[0])


def take_away(files: Files) -> None:
    files.file.unlink()


def move_away(files: Files) -> None:
    files.file.rename(files.moved)


def replace(files: Files) -> None:
    os.replace(files.copy, files.file)


def overwrite(files: Files) -> None:
    shutil.copyfile(files.copy, files.file)


GONE = {
    take_away: "has been deleted or moved away while chatd was using it",
    move_away: "has been deleted or moved away while chatd was using it",
    replace: "was replaced by another file while chatd was using it",
    overwrite: "was overwritten with another database (by cp, for example) while chatd was using it",
}


@pytest.mark.parametrize("change", GONE)
async def test_what_goes_into_a_file_that_has_gone_is_not_acknowledged(files: Files, change: Any) -> None:
    await post(files.daemon, KEPT, "kept")
    await files.set_aside()
    async with login(files.daemon, 1, {"1": KEPT}) as ada:
        await post(files.daemon, SEEN - KEPT, "lost")
        heard = await ada.messages(SEEN - KEPT)
        change(files)
        body = {"conversation_id": 1, "sender_id": 9, "content": "into nothing"}
        try:
            answer = await trio.to_thread.run_sync(files.daemon.request, "POST", "/api/ws/messages", body)
            assert (answer.status, answer.json["code"]) == (503, "unavailable")
        except (OSError, HTTPException):
            pass  # it had noticed before, and gone
        assert await trio.to_thread.run_sync(files.daemon.wait) == 1
        assert not [one for one in ada.received if one["event"] == "message"], "told to nobody"
    assert GONE[change] in files.daemon.log
    if change is move_away:
        assert last_seq(files.moved) >= SEEN, "what was acknowledged before is where the file is"
    kept = KEPT if change in (replace, overwrite) else 0
    await files.start()
    place = await place_of(files.daemon, since(heard[-1]))
    assert (place["recovered"], place["seq"]) == (False, kept)
    await post(files.daemon, 1, "found")
    assert last_seq(files.file) == kept + 1


@pytest.mark.parametrize("change", GONE)
async def test_a_file_that_has_gone_is_noticed_though_nobody_writes(files: Files, change: Any) -> None:
    await files.set_aside()
    change(files)
    with trio.fail_after(5):
        assert await trio.to_thread.run_sync(files.daemon.wait) == 1
    assert GONE[change] in files.daemon.log
    assert "Traceback" not in files.daemon.log
    assert files.file.exists() is (change in (replace, overwrite)), "nobody has made another one"


def whole(file: Path) -> bool:
    with closing(sqlite3.connect(file)) as database:
        return list(database.execute("PRAGMA integrity_check")) == [("ok",)]


MANY = [{"conversation_id": 1, "sender_id": 9, "content": "x" * 500}] * 1000


async def post_many(daemon: Daemon, batches: int) -> None:
    for _ in range(batches):
        path = "/api/ws/messages/batch"
        answer = await trio.to_thread.run_sync(daemon.request, "POST", path, {"messages": MANY})
        assert answer.status == 200


async def overwrite_and_go_on(files: Files) -> None:
    """The log of the old database has pages that are to come into the file: they come nowhere."""
    await post_many(files.daemon, 3)
    await files.set_aside()
    await post_many(files.daemon, 2)  # some of them are in the file by now, some are in the log
    overwrite(files)
    with trio.fail_after(NOTICED):
        assert await trio.to_thread.run_sync(files.daemon.wait) == 1
    assert files.file.read_bytes() == files.copy.read_bytes()
    assert files.file.with_name("chatd.db-wal.left").stat().st_mode & 0o777 == 0o600
    await files.start()
    await post(files.daemon, 1, "found")
    assert last_seq(files.file) == 3001
    await files.stop()
    assert whole(files.file)


async def test_an_overwritten_file_is_not_mixed_with_the_old_one(files: Files) -> None:
    await overwrite_and_go_on(files)


async def test_nor_is_one_that_has_its_name_through_a_link(linked: Files) -> None:
    await overwrite_and_go_on(linked)


async def test_a_link_that_leads_elsewhere_is_noticed_and_both_files_stay_whole(linked: Files) -> None:
    """What was acknowledged before is in the file to which the link led."""
    await post(linked.daemon, KEPT, "kept")
    await linked.set_aside()
    await post(linked.daemon, SEEN - KEPT, "lost")
    link = linked.file.parent.with_name("link.db")
    link.unlink()
    link.symlink_to(linked.copy)
    with trio.fail_after(NOTICED):
        assert await trio.to_thread.run_sync(linked.daemon.wait) == 1
    assert GONE[replace] in linked.daemon.log
    assert (last_seq(linked.file), last_seq(linked.copy)) == (SEEN, KEPT)
    assert whole(linked.file) and whole(linked.copy)


async def test_the_database_of_another_chatd_is_noticed_too(files: Files, tmp_path: Path) -> None:
    """Also one that was started more often."""
    other = tmp_path / "other.db"
    for _ in range(5):
        open_store(Database(url=f"sqlite:///{other}")).close()
    await post(files.daemon, KEPT, "kept")
    shutil.copyfile(other, files.file)
    with trio.fail_after(NOTICED):
        assert await trio.to_thread.run_sync(files.daemon.wait) == 1
    assert GONE[overwrite] in files.daemon.log


async def test_a_copy_of_chatd_backup_is_noticed_too(files: Files, tmp_path: Path) -> None:
    """Made in the same life of the daemon."""
    await post(files.daemon, KEPT, "kept")
    made = await trio.to_thread.run_sync(files.daemon.command, "backup", str(files.copy))
    assert made.returncode == 0, made.stderr
    overwrite(files)
    with trio.fail_after(NOTICED):
        assert await trio.to_thread.run_sync(files.daemon.wait) == 1
    assert GONE[overwrite] in files.daemon.log


async def test_what_others_do_with_sqlite_is_no_other_database(files: Files) -> None:
    """A shell may write, move the log into the file, and compact it."""
    await post_many(files.daemon, 1)
    with closing(sqlite3.connect(files.file, isolation_level=None)) as shell:
        shell.execute("UPDATE chat_messages SET content = 'by hand' WHERE id = 1")
        for statement in ("PRAGMA wal_checkpoint(FULL)", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
            shell.execute(statement)
            await trio.sleep(1.2)  # longer than between two looks
    open_store(Database(url=f"sqlite:///{files.file}")).close()  # another process that serves from it
    await trio.sleep(1.2)
    await post_many(files.daemon, 3)
    assert files.daemon.exit_code is None


def damage(file: Path, table: str) -> None:
    """A disk that has lost the page on which a table begins; of `sqlite_schema` it is that of the header."""
    with closing(sqlite3.connect(file)) as database:
        root, size = database.execute(
            "SELECT coalesce((SELECT rootpage FROM sqlite_schema WHERE name = ?), 1), page_size"
            " FROM pragma_page_size",
            (table,),
        ).fetchone()
    with file.open("r+b") as pages:
        pages.seek((root - 1) * size)
        pages.write(b"\xff" * size)


async def test_a_damaged_file_is_told_with_what_to_do(files: Files) -> None:
    await post(files.daemon, KEPT, "secret")
    await files.stop()
    damage(files.file, "chat_messages")
    await files.start()
    body = {"conversation_id": 1, "sender_id": 9, "content": "another secret"}
    answer = await trio.to_thread.run_sync(files.daemon.request, "POST", "/api/ws/messages", body)
    assert answer.status == 500
    written = next(line for line in files.daemon.log.splitlines() if "write_failed" in line)
    assert json.loads(written)["error"] == "database disk image is malformed"
    told = json.loads(next(line for line in files.daemon.log.splitlines() if "database_damaged" in line))
    assert (told["level"], told["error"]) == ("warning", "database disk image is malformed")
    assert "chatd restore" in told["advice"]
    ready = await trio.to_thread.run_sync(files.daemon.get, "/readyz")
    assert (ready.status, ready.json["checks"]["database"]) == (503, "damaged")
    assert "secret" not in files.daemon.log
