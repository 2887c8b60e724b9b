"""Exports or erases all data about one user.

Erasure deletes messages as the user could, by changes in the log, so clients that are
connected and those that come back both see them go. It reads without locks and writes in
small transactions, so posts continue in the meantime.
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

PAUSE = 0.02  # seconds between two transactions, in which other writers can work
QUEUED = 10  # rows of the outbox or of webhooks read at once: each may hold megabytes
BUSY = 30.0  # seconds that the erasure waits for a moment in which nobody reads from SQLite's log
_NO_HASH = bytes(16)

Row = dict[str, Any]


def export(engine: Engine, user_id: int) -> Iterator[Row]:
    """All rows about a user, one at a time: column → value, plus `table`, the name of the table."""
    tables = (schema.users, schema.members, schema.reads, schema.reactions, schema.messages)
    for table in (*tables, schema.client_ids, schema.removed):
        columns = [column for column in table.c if column.name != "request_hash"]
        query = select(*columns).where(table.c.user_id == user_id)
        for rows in pages(engine, query, *table.primary_key):
            for row in rows:
                yield {"table": str(table.name)} | {str(name): value for name, value in row.items()}


class Erasure:
    """Erases one user; `run` blocks, so it needs a thread or a process of its own."""

    def __init__(self, engine: Engine, user_id: int, node: str | None, tell: Callable[[int], None]) -> None:
        """`node` is the node's name for rows of the outbox, so that other services hear of
        it; None without Redis.

        `tell` gets the number of messages erased so far.
        """
        self._engine, self._user_id, self._node, self._tell = engine, user_id, node, tell

    def run(self, settle: Callable[[], None] = lambda: None) -> int:
        """Erase everything; returns the number of messages whose content was deleted.

        It first makes the user's tokens void. `settle` must return only after the connections with these tokens
        are closed: until then the user can still post.
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
        """Run commands in the transaction of `connection`. A refusal means that the data is gone already."""
        outcomes, _ = Transaction(connection, self._node).run(commands)
        return list(outcomes)

    def _mine(self, table: Table) -> ColumnElement[bool]:
        return table.c.user_id == self._user_id

    def _pages(self, table: Table, *where: ColumnElement[bool]) -> Iterator[Sequence[RowMapping]]:
        """The keys of the user's rows, page by page."""
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
        """Delete all messages, and the client_id and hash of those that the user has deleted before."""
        messages, count = schema.messages, 0
        left = or_(messages.c.deleted_at.is_(None), messages.c.request_hash != _NO_HASH)
        without_key = {"client_id": None, "request_hash": _NO_HASH}
        for rows in self._pages(messages, left):
            ids = [row["id"] for row in rows]
            with self._engine.begin() as connection:
                outcomes = self._execute(connection, [Delete(message_id=id) for id in ids])
                connection.execute(update(messages).where(messages.c.id.in_(ids)).values(without_key))
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

    # The queues: removes the user's words from events that are not delivered yet.

    def _clean_outbox(self) -> None:
        outbox = schema.outbox
        for rows in pages(self._engine, select(outbox.c.id, outbox.c.payloads), outbox.c.id, size=QUEUED):
            for row in rows:
                lines = row["payloads"].split(b"\n")
                kept = [line for line in lines if not self._has_words(json.loads(line))]
                if len(kept) < len(lines):
                    changed = update(outbox).values(payloads=b"\n".join(kept)) if kept else delete(outbox)
                    with self._engine.begin() as connection:
                        connection.execute(changed.where(outbox.c.id == row["id"]))

    def _clean_webhooks(self) -> None:
        webhooks = schema.webhooks
        for rows in pages(self._engine, select(webhooks.c.id, webhooks.c.body), webhooks.c.id, size=QUEUED):
            ids = [row["id"] for row in rows if self._has_words(json.loads(row["body"]))]
            if ids:
                with self._engine.begin() as connection:
                    connection.execute(delete(webhooks).where(webhooks.c.id.in_(ids)))

    def _has_words(self, event: Any) -> bool:
        """Whether an event holds a message of the user, at any depth."""
        if isinstance(event, list):
            return any(map(self._has_words, event))
        if not isinstance(event, dict):
            return False
        words = (event.get("content"), event.get("meta"))
        mine = event.get("user_id") == self._user_id and words != (None, None)
        return mine or any(map(self._has_words, event.values()))


def forget(engine: Engine, *, anew: bool) -> bool:
    """Remove erased bytes from SQLite's log, and with `anew` also from free space. Returns whether that worked.

    Free space may hold older copies of a row, which `secure_delete` does not overwrite. `anew` rewrites the
    whole file, during which nobody can write. PostgreSQL frees the bytes at its next vacuum, and VACUUM FULL
    removes them. Raises OperatorError.
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
            f"SQLite's file may still hold some of the erased bytes ({error}): run this again later."
        ) from error
    finally:
        pooled.close()


def _empty_log(driver: Any) -> bool:
    """Empty the log; whether that worked within `BUSY`.

    A checkpoint of a daemon makes ours fail at once: retry.
    """
    deadline = time.monotonic() + BUSY
    while driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True
