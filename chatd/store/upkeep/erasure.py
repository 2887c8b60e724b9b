"""One user: all that is known of somebody, to hand out or to take away.

What is taken away is taken away as the user could have done it, by changes with a seq of their own: clients
that are connected, and those that come back, see the messages go. Everything is looked for without a lock and
changed in small transactions, so that posts go on meanwhile.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, Table, delete, or_, select, tuple_, update

from chatd.core.errors import OperatorError
from chatd.core.model import State
from chatd.store import schema
from chatd.store.engine import is_sqlite
from chatd.store.upkeep.scans import pages
from chatd.store.write.commands import AnyCommand, Changed, Delete, React, SetMember, SetUser
from chatd.store.write.transaction import Transaction

PAUSE = 0.02  # seconds between two transactions, for everybody else
QUEUED = 10  # rows of the outbox or of webhooks that are looked at in one go: each may hold megabytes
BUSY = 30.0  # seconds in which SQLite's log must become free, at some moment, of everybody else
_NO_HASH = bytes(16)

Row = dict[str, Any]


def export(engine: Engine, user_id: int) -> Iterator[Row]:
    """Everything, a row at a time, each with the `table` it is from. Names are those of the tables."""
    tables = (schema.users, schema.members, schema.reads, schema.reactions, schema.messages)
    for table in (*tables, schema.client_ids, schema.removed):
        columns = [column for column in table.c if column.name != "request_hash"]
        query = select(*columns).where(table.c.user_id == user_id)
        for rows in pages(engine, query, *table.primary_key):
            for row in rows:
                yield {"table": str(table.name)} | {str(name): value for name, value in row.items()}


class Erasure:
    """`run` blocks. `node` is for the outbox, so that other services hear of it; None without Redis."""

    def __init__(self, engine: Engine, user_id: int, node: str | None, tell: Callable[[int], None]) -> None:
        """`tell` gets the number of messages erased so far."""
        self._engine, self._user_id, self._node, self._tell = engine, user_id, node, tell

    def run(self, settle: Callable[[], None] = lambda: None) -> int:
        """The number of messages whose content is gone.

        First tokens become void. `settle` returns when the connections that were made with them have ended:
        until then the user can go on speaking.
        """
        self._commit([SetUser(user_id=self._user_id, valid_after=int(time.time()) + 1, now=True)])
        self._leave_rooms()
        settle()
        count = self._delete_messages()
        self._take_back_reactions()
        for table in (schema.reactions, schema.reads, schema.client_ids):
            self._remove_rows(table)
        self._remove_rows(schema.members, schema.members.c.state != State.BANNED.value)
        self._clean_outbox()
        self._clean_webhooks()
        return count

    def _commit(self, commands: Sequence[AnyCommand]) -> list[Any]:
        with self._engine.begin() as connection:
            return self._execute(connection, commands)

    def _execute(self, connection: Connection, commands: Sequence[AnyCommand]) -> list[Any]:
        """A refusal is fine: what was to go is gone already."""
        outcomes, _ = Transaction(connection, self._node).run(commands)
        return list(outcomes)

    def _mine(self, table: Table) -> ColumnElement[bool]:
        return table.c.user_id == self._user_id

    def _pages(self, table: Table, *where: ColumnElement[bool]) -> Iterator[Sequence[RowMapping]]:
        """The keys of the user's rows, bit by bit."""
        key = list(table.primary_key)
        for rows in pages(self._engine, select(*key).where(self._mine(table), *where), *key):
            yield rows
            time.sleep(PAUSE)

    def _leave_rooms(self) -> None:
        active = schema.members.c.state == State.ACTIVE.value
        for rows in self._pages(schema.members, active):
            ids = [row["conversation_id"] for row in rows]
            self._commit(
                [SetMember(conversation_id=id, user_id=self._user_id, state=State.REMOVED) for id in ids]
            )

    def _delete_messages(self) -> int:
        """Also what is known of those that the user has deleted before."""
        messages, count = schema.messages, 0
        left = or_(messages.c.deleted_at.is_(None), messages.c.request_hash != _NO_HASH)
        nameless = {"client_id": None, "request_hash": _NO_HASH}
        for rows in self._pages(messages, left):
            ids = [row["id"] for row in rows]
            with self._engine.begin() as connection:
                outcomes = self._execute(connection, [Delete(message_id=id) for id in ids])
                connection.execute(update(messages).where(messages.c.id.in_(ids)).values(nameless))
            count += sum(isinstance(outcome, Changed) for outcome in outcomes)
            self._tell(count)
        return count

    def _take_back_reactions(self) -> None:
        messages, reactions = schema.messages, schema.reactions
        query = select(*reactions.primary_key, messages.c.chat_conversation_id)
        given = query.join(messages, messages.c.id == reactions.c.message_id).where(self._mine(reactions))
        for rows in pages(self._engine, given, *reactions.primary_key):
            self._commit([self._take_back(row) for row in rows])
            time.sleep(PAUSE)

    def _take_back(self, row: RowMapping) -> React:
        id, conversation_id = row["message_id"], row["chat_conversation_id"]
        return React(
            message_id=id, conversation_id=conversation_id, user_id=self._user_id, emoji=row["emoji"], on=False
        )

    def _remove_rows(self, table: Table, *where: ColumnElement[bool]) -> None:
        key = tuple_(*table.primary_key)
        for rows in self._pages(table, *where):
            with self._engine.begin() as connection:
                connection.execute(delete(table).where(key.in_([tuple(row.values()) for row in rows])))

    # What is still to be told to others, without what the user said.

    def _clean_outbox(self) -> None:
        outbox = schema.outbox
        for rows in pages(self._engine, select(outbox.c.id, outbox.c.payloads), outbox.c.id, size=QUEUED):
            for row in rows:
                lines = row["payloads"].split(b"\n")
                kept = [line for line in lines if not self._says(json.loads(line))]
                if len(kept) < len(lines):
                    changed = update(outbox).values(payloads=b"\n".join(kept)) if kept else delete(outbox)
                    with self._engine.begin() as connection:
                        connection.execute(changed.where(outbox.c.id == row["id"]))

    def _clean_webhooks(self) -> None:
        webhooks = schema.webhooks
        for rows in pages(self._engine, select(webhooks.c.id, webhooks.c.body), webhooks.c.id, size=QUEUED):
            ids = [row["id"] for row in rows if self._says(json.loads(row["body"]))]
            if ids:
                with self._engine.begin() as connection:
                    connection.execute(delete(webhooks).where(webhooks.c.id.in_(ids)))

    def _says(self, told: Any) -> bool:
        """Whether the user's own words are in an event, however deep."""
        if isinstance(told, list):
            return any(map(self._says, told))
        if not isinstance(told, dict):
            return False
        words = (told.get("content"), told.get("meta"))
        mine = told.get("user_id") == self._user_id and words != (None, None)
        return mine or any(map(self._says, told.values()))


def forget(engine: Engine, *, anew: bool) -> bool:
    """Leave nothing of what was erased in SQLite's log, and if `anew` in free space; whether that was possible.

    What was moved about or replaced before it was erased may be in free space, in spite of `secure_delete`. To
    write the file anew takes its time, in which nobody else can write. PostgreSQL frees bytes when it vacuums;
    VACUUM FULL overwrites. Raises OperatorError.
    """
    if not is_sqlite(engine):
        return True
    pooled = engine.raw_connection()
    try:
        driver: Any = pooled.driver_connection
        if anew:
            driver.execute("VACUUM")
        return _empty_log(driver)
    except sqlite3.Error as error:
        raise OperatorError(
            f"SQLite's file may hold some bytes still ({error}): run it again later."
        ) from error
    finally:
        pooled.close()


def _empty_log(driver: Any) -> bool:
    """A daemon that just does the same makes it fail at once, whatever its patience is."""
    deadline = time.monotonic() + BUSY
    while driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True
