"""The writer and the reads, on SQLite and on PostgreSQL: numbering, idempotency, groups, failures."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import trio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType
from sqlalchemy import ClauseElement, event, text

from chatd.config import Database
from chatd.core import limits
from chatd.core.errors import ChatError, ConfigError, Unavailable
from chatd.core.model import Group, Position, State
from chatd.store import schema
from chatd.store.database import Store, open_store
from chatd.store.engine import writing_engine
from chatd.store.read import lookups, snapshots
from chatd.store.read import statements as queries
from chatd.store.read.snapshots import Entry
from chatd.store.write import packing, statements
from chatd.store.write.commands import (
    AnyCommand,
    Changed,
    Create,
    Created,
    Delete,
    Edit,
    MemberSet,
    Notify,
    Rights,
    SetMember,
)
from chatd.store.write.writer import QUEUE, QUEUE_BYTES, Writer


class Bench:
    """A store with its writer running; `groups` are the commits."""

    def __init__(self, store: Store, writer: Writer, groups: list[Group]) -> None:
        self.store, self.writer, self.groups = store, writer, groups

    async def do(self, *commands: Any) -> list[Any]:
        """The outcomes of one submission; an error stands as its code."""
        outcomes = await self.writer.submit(commands).outcomes()
        return [outcome.code if isinstance(outcome, ChatError) else outcome for outcome in outcomes]

    @property
    def dialect(self) -> str:
        return self.store._writing.dialect.name

    @property
    def seqs(self) -> list[int]:
        return [change.seq for group in self.groups for change in group.changes]

    def scalar(self, query: str) -> Any:
        with self.store._writing.connect() as connection:
            return connection.scalar(text(query))

    def execute(self, statement: str) -> None:
        with self.store._writing.begin() as connection:
            connection.execute(text(statement))

    def plan(self, statement: str, values: Any) -> list[str]:
        """What SQLite would do for a statement, a line a step."""
        if not statement.startswith(("SELECT", "INSERT", "UPDATE", "DELETE")):
            return []
        with closing(sqlite3.connect(str(self.store._writing.url.database))) as connection, connection:
            one = values[0] if isinstance(values, list) else values
            return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", one)]


@asynccontextmanager
async def bench(url: str, *, node: str | None = None) -> AsyncIterator[Bench]:
    store = open_store(Database(url=url))
    groups: list[Group] = []
    writer = store.writer(node=node, on_commit=groups.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        try:
            yield Bench(store, writer, groups)
        finally:
            nursery.cancel_scope.cancel()
            store.close()


def post(content: str = "x", **fields: Any) -> Create:
    return Create(**{"conversation_id": 1, "user_id": 1, "content": content} | fields)


async def rooms_of(
    b: Bench, user_id: int, rooms: Any, *, same_epoch: bool = True, **how: bool
) -> dict[int, Any]:
    epoch = None if same_epoch else "another"
    (found,) = await b.store.read(snapshots.snapshots, [Entry(user_id, rooms, epoch, 100, **how)])
    return dict(found)


async def snapshot_of(
    b: Bench,
    user_id: int,
    after: int | None,
    *,
    mark: str | UnsetType | None = UNSET,
    entitled: bool = True,
    same_epoch: bool = True,
) -> Any:
    """Of conversation 1."""
    return (await rooms_of(b, user_id, [(1, Position(after, mark), entitled)], same_epoch=same_epoch))[1]


async def test_seq_is_one_two_three_in_commit_order_without_a_hole(database_url: str) -> None:
    async with bench(database_url) as b:
        submissions = [b.writer.submit([post(str(n), conversation_id=1 + n % 2)]) for n in range(200)]
        created = [(await submission.outcomes())[0] for submission in submissions]
        for conversation in (0, 1):
            mine = created[conversation::2]
            assert [c.seq for c in mine] == list(range(1, 101))
            assert [c.id for c in mine] == sorted(c.id for c in mine)
        assert len(b.groups) < 20, "committed in groups"
        page = await b.store.read(lookups.history, 1, None, None, 100)
        assert [m.content for m in page.messages] == [str(n) for n in range(0, 200, 2)]


async def test_no_statement_walks_through_a_table(tmp_path: Path) -> None:
    """A post must not cost more where many are stored. What SQLite would do is asked for each statement."""
    async with bench(f"sqlite:///{tmp_path}/chatd.db", node="one") as b:
        ran: list[tuple[str, Any]] = []
        for engine in (b.store._writing, b.store._reading):
            event.listen(engine, "before_cursor_execute", lambda *given: ran.append(given[2:4]))
        first, _, _ = await b.do(post(client_id="k"), post(user_id=2), post(reply_to=None, client_id="l"))
        await b.do(post(client_id="k"), Edit(message_id=first.id, content="y"), Delete(message_id=first.id))
        await b.do(SetMember(conversation_id=1, user_id=3, state=State.ACTIVE), post(reply_to=2))
        rooms = [(1, Position(1, "x"), True), (2, Position(), True)]
        await b.store.read(snapshots.logins, [Entry(1, rooms, None, 100)])
        await b.store.read(lookups.history, 1, 4, None, 10)
        await b.store.read(lookups.history_for, 1, True, 1, None, 1, 10)
        await b.store.read(lookups.missing, 1, 1, None)
        await b.store.read(lookups.rights, 1, [1, 2])
        await b.store.read(lookups.conversations_of, 1, 100)
        walks = [f"{plan}: {statement}" for statement, values in ran for plan in b.plan(statement, values)
                 if plan.startswith("SCAN chat_")]  # fmt: skip
        assert len(ran) > 30
        assert walks == []


async def test_what_is_refused_takes_no_seq(database_url: str) -> None:
    async with bench(database_url) as b:
        outcomes = await b.do(
            post("a"),
            post("b", reply_to=99),
            post("c", conversation_id=2, rights=Rights.MEMBER),
            post("d", user_id=7, rights=Rights.MEMBER),
            post("e"),
        )
        assert outcomes[1:4] == ["bad_request", "not_found", "not_found"]
        assert [outcomes[0].seq, outcomes[4].seq] == [1, 2]
        assert b.scalar("SELECT count(*) FROM chat_conversations") == 1


async def test_a_retry_is_answered_with_the_first_also_within_its_group(database_url: str) -> None:
    async with bench(database_url) as b:
        first, again, other = await b.do(
            post("a", client_id="k", meta={"x": 1, "y": 2}),
            post("a", client_id="k", meta={"y": 2, "x": 1}),
            post("b", client_id="k"),
        )
        assert (again.id, again.seq, again.created_at, again.duplicate) == (first.id, 1, first.created_at, True)
        assert other == "conflict"
        for changed in ({"type": "image"}, {"meta": None}, {"meta": {"x": 1}}):
            assert await b.do(post("a", client_id="k", **({"meta": {"x": 1, "y": 2}} | changed))) == [
                "conflict"
            ]
        (elsewhere,) = await b.do(post("a", client_id="k", conversation_id=2))
        (somebody,) = await b.do(post("b", client_id="k", user_id=2))
        assert (elsewhere.duplicate, somebody.duplicate) == (False, False)
        assert b.scalar("SELECT count(*) FROM chat_messages") == 3


async def test_the_index_itself_forbids_a_second_row(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(post("a", client_id="k"))
        with pytest.raises(Exception, match=r"(?i)unique"):
            b.execute(
                "INSERT INTO chat_messages (chat_conversation_id, user_id, type, created_at, updated_at,"
                " seq, client_id, request_hash) SELECT chat_conversation_id, user_id, type, created_at,"
                " updated_at, 9, client_id, request_hash FROM chat_messages"
            )


async def test_a_retry_still_counts_after_an_edit_a_delete_and_a_restart(database_url: str) -> None:
    async with bench(database_url) as b:
        (first,) = await b.do(post("a", client_id="k"))
        await b.do(Edit(message_id=first.id, content="b"), Delete(message_id=first.id))
    async with bench(database_url) as b:
        (again,) = await b.do(post("a", client_id="k"))
        assert (again.id, again.seq, again.duplicate) == (first.id, 1, True)


async def test_changes_are_logged_with_the_message_as_it_is_now(database_url: str) -> None:
    async with bench(database_url) as b:
        (created,) = await b.do(post("a", meta={"k": [1, None, "é"]}))
        edited, deleted, gone = await b.do(
            Edit(message_id=created.id, content="b"),
            Delete(message_id=created.id),
            Edit(message_id=created.id, content="c"),
        )
        assert (edited, deleted, gone) == (Changed(created.id, 2), Changed(created.id, 3), "not_found")
        assert [b'"content":"b"' in c.payload for g in b.groups for c in g.changes] == [False, True, False]
        replay, complete = await b.store.read(lookups.changes_after, 1, 0)
        assert complete
        assert [(c.seq, c.kind) for c in replay] == [(1, "created"), (2, "edited"), (3, "deleted")]
        assert all(b'"content":null,"meta":null' in change.payload for change in replay)
        assert b.scalar("SELECT seq FROM chat_messages") == 1


async def test_rights_are_judged_where_the_commit_is(database_url: str) -> None:
    async with bench(database_url) as b:
        remove = SetMember(conversation_id=1, user_id=2, state=State.REMOVED)
        outcomes = await b.do(
            post("a", user_id=2),
            post("b", user_id=2, rights=Rights.MEMBER),
            remove,
            post("c", user_id=2, rights=Rights.MEMBER),
            post("d", user_id=2, rights=Rights.ENTITLED),
            post("e", user_id=2),
            post("f", user_id=2, rights=Rights.ENTITLED),
        )
        assert [o if isinstance(o, str) else type(o) for o in outcomes] == [
            Created, Created, MemberSet, "not_found", "not_found", Created, "not_found",
        ]  # fmt: skip
        assert [(m.user_id, m.state) for g in b.groups for m in g.members] == [(2, "active"), (2, "removed")]


async def test_a_muted_member_reads_but_does_not_write(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(post("a", user_id=2, client_id="k"))
        mute = SetMember(
            conversation_id=1, user_id=2, state=State.ACTIVE, muted_until="2999-01-01T00:00:00.000000Z"
        )
        muted, again, over = await b.do(
            mute,
            post("b", user_id=2, rights=Rights.MEMBER),
            post("a", user_id=2, client_id="k", rights=Rights.MEMBER),
        )
        assert (muted.changed, again, over.duplicate) == (False, "muted", True)
        snapshot = await snapshot_of(b, 2, 0, entitled=False)
        assert len(snapshot.changes) == 1


async def test_one_bad_command_harms_nobody_else_in_its_group(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(post("before"))
        good = [b.writer.submit([post(f"g{n}")]) for n in range(5)]
        bad = b.writer.submit([post("too long a type", type="x" * 40, user_id=2**70)])
        more = [b.writer.submit([post(f"h{n}")]) for n in range(5)]
        outcomes = [(await s.outcomes())[0] for s in [*good, bad, *more]]
        assert [getattr(o, "code", "ok") for o in outcomes] == ["ok"] * 5 + ["internal"] + ["ok"] * 5
        assert b.seqs == list(range(1, 12))


async def test_a_group_that_fails_to_commit_is_unavailable_and_not_tried_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(database_url) as b:
        await b.do(post("before"))
        commits = 0

        def fail(_: Any) -> None:
            nonlocal commits
            commits += 1
            raise ConnectionResetError("the server went away in the middle of COMMIT")

        with monkeypatch.context() as patch:
            patch.setattr(b.store._writing.dialect, "do_commit", fail)
            assert await b.do(post("lost"), post("too")) == ["unavailable", "unavailable"]
        assert commits == 1
        assert [o.seq for o in await b.do(post("after"))] == [2]


async def test_a_caller_that_is_cancelled_does_not_undo_its_write(database_url: str) -> None:
    async with bench(database_url) as b:
        with trio.CancelScope() as scope:
            scope.cancel()
            await b.writer.submit([post("written", client_id="k")]).outcomes()
        assert scope.cancelled_caught
        assert (await b.do(post("written", client_id="k")))[0].duplicate


async def test_a_full_queue_answers_unavailable(tmp_path: Path) -> None:
    store = open_store(Database(url=f"sqlite:///{tmp_path}/x.db"))
    writer = store.writer(node=None, on_commit=lambda group: None)
    writer.submit([post()] * QUEUE)
    with pytest.raises(Unavailable) as refused:
        writer.submit([post()])
    assert refused.value.details["retry_after"] > 0
    store.close()


async def test_the_bound_counts_all_that_waits_in_bytes(tmp_path: Path) -> None:
    store = open_store(Database(url=f"sqlite:///{tmp_path}/chatd.db"))
    writer = store.writer(node=None, on_commit=lambda _: None)
    command = post(meta=["x" * 8000])
    with pytest.raises(Unavailable):
        for _ in range(5000):
            writer.submit([command])
    assert 3000 < len(writer._waiting) < QUEUE_BYTES / 8000
    store.close()


async def test_meta_waits_as_small_as_it_came(tmp_path: Path) -> None:
    """8 kB of it may be thousands of lists, which take twenty times as much memory when decoded."""
    store = open_store(Database(url=f"sqlite:///{tmp_path}/chatd.db"))
    writer = store.writer(node=None, on_commit=lambda _: None)
    text = b"[" + b"[]," * 2700 + b"[]]"
    tracemalloc.start()
    try:
        for _ in range(20):
            writer.submit([post(meta=msgspec.json.decode(text))])
        assert tracemalloc.get_traced_memory()[0] < 20 * 20_000
    finally:
        tracemalloc.stop()
        store.close()


@pytest.mark.parametrize(
    "big",
    [
        post(content="x" * 1_000_000),
        post(content="\U0001f600" * 250_000),
        post(meta=["x" * 1_000_000]),
        Edit(message_id=1, meta={"k": "x" * 1_000_000}),
        Notify(event="message.created", body=b"x" * 1_000_000),
    ],
)
def test_a_command_counts_with_all_that_is_in_it(big: AnyCommand) -> None:
    assert 1_000_000 <= packing.size(packing.pack(big)) < 1_010_000


async def test_who_waits_too_long_is_told_that_the_outcome_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.store.write.writer.DEADLINE", 0.1)
    monkeypatch.setattr("chatd.store.write.writer.OVERDUE_TICK", 0.02)
    async with bench(f"sqlite:///{tmp_path}/chatd.db") as b:
        with closing(sqlite3.connect(tmp_path / "chatd.db", isolation_level=None)) as somebody, somebody:
            somebody.execute("BEGIN IMMEDIATE")
            told: list[Any] = []
            b.writer.submit([post("first")], told.append)
            with trio.fail_after(2):
                assert await b.do(post("second", client_id="k")) == ["unavailable"]
            assert [type(outcome) for (outcome,) in told] == [Unavailable]
            somebody.execute("ROLLBACK")
        monkeypatch.setattr("chatd.store.write.writer.DEADLINE", 10)
        (again,) = await b.do(post("second", client_id="k"))
        assert (again.seq, again.duplicate) == (2, True), "it was committed when the database could"
        assert len(told) == 1


async def test_an_answer_that_fails_harms_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(outcomes: Any) -> None:
        raise RuntimeError("a bug in a session")

    async with bench(f"sqlite:///{tmp_path}/chatd.db") as b:
        b.writer.submit([post("a")], fail)
        assert [(await b.do(post("b")))[0].seq, (await b.do(post("c")))[0].seq] == [2, 3]
    assert "answer_failed" in capsys.readouterr().out


async def test_closing_flushes_what_waits(database_url: str) -> None:
    async with bench(database_url) as b:
        waiting = [b.writer.submit([post()]) for _ in range(700)]
        b.writer.close()
        with trio.fail_after(10):
            await b.writer.finished.wait()
        assert (await waiting[-1].outcomes())[0].seq == 700
        with pytest.raises(Unavailable):
            b.writer.submit([post()])


async def test_the_outbox_holds_a_group_until_it_is_settled(database_url: str) -> None:
    async with bench(database_url, node="n1") as b:
        await b.do(post("a"), post("b"))
        (group,) = b.groups
        assert group.outbox_id is not None
        assert b.scalar("SELECT count(*) FROM chat_outbox") == 1
        b.store.outbox.settle([group.outbox_id])
        await b.do(post("c"))
        assert b.scalar("SELECT count(*) FROM chat_outbox") == 1, "the row of this group alone"


async def test_unread_counts_others_messages_up_to_a_thousand(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post(user_id=2) for _ in range(5)], *[post(user_id=3) for _ in range(1100)])

        async def unread(user: int) -> int:
            return (await snapshot_of(b, user, None)).unread

        assert [await unread(user) for user in (2, 3, 9)] == [1000, 5, 1000]


async def test_what_one_node_is_relaying_does_not_hide_the_rest(postgres_url: str) -> None:
    async with bench(postgres_url, node="n1") as b:
        for number in range(120):
            await b.do(post(str(number)))
        relayed: list[int] = []

        def relay_meanwhile(row: Any) -> None:
            """Another node asks while the first holds its rows."""
            relayed.append(row.id)
            if len(relayed) == 1:
                b.store.outbox._relay(lambda other: relayed.append(other.id), "n1", 0)

        await trio.to_thread.run_sync(b.store.outbox._relay, relay_meanwhile, "n1", 0)
        assert len(relayed) == len(set(relayed)) == 100


async def test_snapshots_say_whether_everything_missed_is_in_them(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post(f"m{n}") for n in range(400)])

        async def enter(after: int | None, same_epoch: bool = True) -> lookups.Snapshot:
            return await snapshot_of(b, 9, after, same_epoch=same_epoch)

        fresh = await enter(None)
        assert (fresh.seq, fresh.recovered, fresh.changes, fresh.unread) == (400, True, [], 400)
        some = await enter(100)
        assert (some.recovered, len(some.changes), some.has_more) == (True, 300, False)
        for after, same in ((99, True), (401, True), (399, False)):
            lost = await enter(after, same)
            assert (lost.recovered, len(lost.changes), lost.has_more) == (False, 50, True), after
            assert b'"content":"m399"' in lost.changes[-1].payload


async def test_replays_are_bounded_in_bytes(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(*[post("é" * 8000) for _ in range(40)])
        snapshot = await snapshot_of(b, 1, 0)
        assert not snapshot.recovered
        assert 0 < size_of(snapshot) <= 32 * 1024
        assert snapshot.has_more
        page = await b.store.read(lookups.history, 1, None, None, 100)
        assert sum(len(message.content) for message in page.messages) < 128 * 1024  # characters of two bytes


def size_of(snapshot: Any) -> int:
    return sum(len(change.payload) for change in snapshot.changes)


async def test_who_has_fallen_behind_is_told_all_of_it_in_portions(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one change that is larger than a portion, and more of them than a client that comes back gets."""
    sizes = [10] * 350 + [7000] * 30 + [200_000] + [10] * 5
    async with bench(database_url) as b:
        for size in sizes:
            b.writer.submit([post("x" * size)])
        await b.do(post())
        told, after, mark = [], 0, None
        portions = 0
        while portions < 20:
            portions += 1
            snapshot = (await rooms_of(b, 1, [(1, Position(after, mark), True)], portion=True))[1]
            assert snapshot.recovered
            assert len(snapshot.changes) == 1 or size_of(snapshot) <= limits.PORTION_BYTES
            told += [change.seq for change in snapshot.changes]
            assert (told[-1], snapshot.changes[-1].mark) == (snapshot.seq, snapshot.mark)
            after, mark = snapshot.seq, snapshot.mark
            if not snapshot.later:
                break
        assert told == list(range(1, len(sizes) + 2))
        assert portions > 3
        (other,) = (await rooms_of(b, 1, [(1, Position(5, "another's"), True)], portion=True)).values()
        monkeypatch.setattr(limits, "BEHIND_CHANGES", 100)
        (much,) = (await rooms_of(b, 1, [(1, Position(0, None), True)], portion=True)).values()
        for snapshot in (other, much):
            assert (snapshot.recovered, snapshot.later, snapshot.seq) == (False, False, len(sizes) + 1)


async def test_what_does_not_fit_into_a_brief_answer_is_left_for_later(database_url: str) -> None:
    async with bench(database_url) as b:
        for conversation in (1, 2, 3, 4):
            await b.do(*[post("x" * 7800, conversation_id=conversation) for _ in range(4 - conversation % 2)])
        rooms = [(conversation, Position(0), True) for conversation in (1, 2, 3)]
        found = await rooms_of(b, 1, [*rooms, (4, Position(2, "of another history"), True)], brief=True)
        kept = [(s.recovered, len(s.changes), s.has_more, s.later) for s in found.values()]
        assert kept == [
            (True, 3, False, False),
            (True, 0, False, True),
            (True, 0, False, True),
            (False, 1, True, False),
        ]
        assert sum(map(size_of, found.values())) <= 32 * 1024
        later = await rooms_of(b, 1, [(2, Position(0), True)])
        assert (later[2].recovered, len(later[2].changes), later[2].later) == (True, 4, False)


def test_the_schema_is_what_the_migrations_make(database_url: str) -> None:
    open_store(Database(url=database_url)).close()
    engine = writing_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_a_database_of_a_newer_chatd_is_refused_with_a_sentence(database_url: str) -> None:
    open_store(Database(url=database_url)).close()
    engine = writing_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match="which this chatd does not know"):
        open_store(Database(url=database_url))


def test_sqlite_commits_are_on_the_disk(tmp_path: Path) -> None:
    """G1: WAL alone would lose the last commits with the power."""
    store = open_store(Database(url=f"sqlite:///{tmp_path}/x.db"))
    with store._writing.connect() as connection:
        assert connection.scalar(text("PRAGMA synchronous")) == 2, "FULL"
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    store.close()


def test_postgresql_commits_are_on_the_disk(postgres_url: str) -> None:
    store = open_store(Database(url=postgres_url))
    with store._writing.connect() as connection:
        assert connection.scalar(text("SHOW synchronous_commit")) == "on"
    with store._reading.connect() as connection:
        assert connection.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    store.close()


async def test_a_locked_sqlite_answers_unavailable_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatd.store.engine.SQLITE_BUSY_SECONDS", 0.2)
    async with bench(f"sqlite:///{tmp_path}/x.db") as b:
        await b.do(post("a"))
        backup = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
        backup.execute("BEGIN IMMEDIATE")
        assert await b.do(post("b")) == ["unavailable"]
        assert len((await b.store.read(lookups.history, 1, None, None, 9)).messages) == 1, "reads go on"
        backup.execute("ROLLBACK")
        backup.close()
        assert (await b.do(post("c")))[0].seq == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.lists(
            st.tuples(st.sampled_from(["create", "edit", "delete"]), st.integers(1, 3), st.integers(1, 6)),
            max_size=8,
        ),
        max_size=5,
    )
)
def test_any_mix_of_commands_leaves_a_log_without_a_hole(tmp_path_factory: Any, groups: Any) -> None:
    async def play() -> None:
        async with bench(f"sqlite:///{tmp_path_factory.mktemp('mix')}/x.db") as b:
            for group in groups:
                commands: list[Any] = []
                for kind, conversation, number in group:
                    if kind == "create":
                        commands.append(post(conversation_id=conversation, client_id=str(number)))
                    elif kind == "edit":
                        commands.append(Edit(message_id=number, content="y"))
                    else:
                        commands.append(Delete(message_id=number))
                if commands:
                    await b.do(*commands)
            for conversation in (1, 2, 3):
                log, _ = await b.store.read(lookups.changes_after, conversation, 0)
                told = [c for g in b.groups for c in g.changes if c.conversation_id == conversation]
                assert [c.seq for c in told] == list(range(1, len(told) + 1))
                assert [c.seq for c in log] == [c.seq for c in told]

    trio.run(play)


def test_no_statement_is_sent_in_a_pipeline(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is stopped within one holds its locks for ever: no deadline of PostgreSQL counts there."""

    pipelines: list[Any] = []
    pipeline = psycopg.Connection._pipeline_nolock
    monkeypatch.setattr(
        "psycopg.Connection._pipeline_nolock", lambda self: pipelines.append(self) or pipeline(self)
    )

    async def write() -> None:
        async with bench(postgres_url) as b:
            created = await b.do(*(post("a", conversation_id=c, user_id=c) for c in range(1, 20)))
            edits = [Edit(message_id=one.id, content="b") for one in created]
            assert {type(one).__name__ for one in await b.do(*edits)} == {"Changed"}
            again = await b.do(*(post("c", conversation_id=c) for c in range(1, 20)))
            assert [one.seq for one in again] == [3] * 19

    trio.run(write)
    assert pipelines == []


async def test_a_conversation_that_somebody_holds_holds_up_no_other(postgres_url: str) -> None:
    async with bench(postgres_url) as b:
        await b.do(*(post("there", conversation_id=c) for c in (1, 2, 3)))
        with psycopg.connect(postgres_url) as frozen:
            frozen.execute("SELECT * FROM chat_conversations WHERE id = 2 FOR UPDATE")
            with trio.fail_after(4):
                outcomes = await b.do(*(post("more", conversation_id=c) for c in (1, 2, 3, 2)))
            assert (outcomes[0].seq, outcomes[2].seq) == (2, 2)
            assert (outcomes[1], outcomes[3]) == ("unavailable", "unavailable")
            assert not b.writer.failing, "the database takes writes"
        assert (await b.do(post("free", conversation_id=2)))[0].seq == 2


async def test_a_list_may_be_longer_than_postgresql_has_parameters(database_url: str) -> None:
    """Of 70,000 people in a room, 70,000 rooms, messages and changes: each list is one parameter."""
    many = list(range(1, 70_001))
    async with bench(database_url) as b:
        await b.do(post("a", client_id="a"))
        version, states = await b.store.read(lookups.rights, 1, many)
        assert (version, states) == (1, {1: State.ACTIVE})
        assert (await b.store.read(lookups.heads, many)).keys() == {1}
        assert await b.store.read(lookups.standings, many) == {}
        await b.store.read(lookups.marks_of, [(1, after) for after in many])
        b.store.outbox.settle(many)
        assert (await b.do(post("b")))[0].seq == 2


async def test_each_statement_with_a_list_takes_a_long_one(database_url: str) -> None:
    """Whatever there is: also those whose lists nobody makes long today."""
    many = list(range(1, 70_001))
    lists = {"ids": many, "conversation_ids": many, "user_ids": many}
    async with bench(database_url) as b:
        tried = 0
        for module in (queries, statements):
            for name, statement in vars(module).items():
                one = statement.get(b.dialect) if isinstance(statement, dict) else statement
                asked = set(one.compile().params) if isinstance(one, ClauseElement) else set()
                if asked & lists.keys() and not name.startswith("_"):
                    given = lists | {"conversation_id": 1, "after": 0, "most": 1}
                    with b.store._writing.begin() as connection:
                        connection.execute(one, {key: given[key] for key in asked})
                    tried += 1
        assert tried >= 10


# Marks.


async def test_a_mark_decides_and_the_epoch_is_not_looked_at(database_url: str) -> None:
    async with bench(database_url) as b:
        for content in "abcdef":
            await b.do(post(content))
        changes = [change for group in b.groups for change in group.changes]
        marks = [change.mark for change in changes]
        assert len(set(marks)) == 6, "each transaction has its own"
        assert [change.previous for change in changes] == [None, *marks[:-1]]
        for same_epoch in (True, False):
            for seq, mark in enumerate(marks, 1):
                own = await snapshot_of(b, 1, seq, mark=mark, same_epoch=same_epoch)
                assert (own.recovered, own.seq, own.mark) == (True, 6, marks[-1])
                told = [msgspec.json.decode(change.payload)["mark"] for change in own.changes]
                assert told == marks[seq:]
                for other in (marks[seq % 6], "x", None):
                    assert not (await snapshot_of(b, 1, seq, mark=other, same_epoch=same_epoch)).recovered
            assert not (await snapshot_of(b, 1, 7, mark="x", same_epoch=same_epoch)).recovered
            assert not (await snapshot_of(b, 1, 0, mark="x", same_epoch=same_epoch)).recovered


async def test_one_transaction_has_one_mark_and_its_changes_are_chained(database_url: str) -> None:
    async with bench(database_url) as b:
        await b.do(post("1"), post("other", conversation_id=2))
        await b.do(post("2"), post("3"), post("other", conversation_id=2))
        (first, second) = ([c for c in group.changes if c.conversation_id == 1] for group in b.groups)
        assert second[0].mark == second[1].mark != first[0].mark
        assert [change.previous for change in second] == [first[0].mark, second[0].mark]


async def test_a_version_before_marks_writes_beside(database_url: str) -> None:
    """Its changes have none. Nobody takes the mark of an older change for theirs."""
    async with bench(database_url) as b:
        await b.do(post("marked"))
        (first,) = b.groups[0].changes
        with b.store._writing.begin() as connection:
            for statement in (
                "INSERT INTO chat_changes (conversation_id, seq, kind, message_id) VALUES (1, 2, 'edited', 1)",
                "UPDATE chat_conversations SET last_seq = 2 WHERE id = 1",
            ):
                connection.exec_driver_sql(statement)
        assert (await snapshot_of(b, 1, 2)).mark is None
        assert (await snapshot_of(b, 1, 1, mark=first.mark)).recovered
        assert (await snapshot_of(b, 1, 2, mark=None)).recovered
        assert not (await snapshot_of(b, 1, 2, mark=first.mark)).recovered
        await b.do(SetMember(conversation_id=1, user_id=3, state=State.ACTIVE))
        assert (await snapshot_of(b, 1, 2)).mark is None, "a member is no change"
        await b.do(post("marked again"))
        (third,) = b.groups[-1].changes
        assert (third.seq, third.previous) == (3, None)
        assert (await snapshot_of(b, 1, 2, mark=None)).recovered
        missing = await b.store.read(lookups.missing, 1, 1, first.mark)
        assert missing.same
        assert [(c.mark, c.previous) for c in missing.changes] == [(None, first.mark), (third.mark, None)]
