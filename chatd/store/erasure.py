"""One user: all that is known of somebody, to hand out or to take away.

What is taken away is taken away as the user could have done it, by changes with a seq of their own: clients
that are connected, and those that come back, see the messages go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Table, delete, select, update

from chatd.model import State
from chatd.store import schema
from chatd.store.commands import AnyCommand, Delete, React, SetMember, SetUser
from chatd.store.engine import is_sqlite, unhurried
from chatd.store.transaction import Transaction

BATCH = 100  # messages of one transaction
_NO_HASH = bytes(16)

Row = dict[str, Any]


def export(connection: Connection, user_id: int) -> Iterator[Row]:
    """Everything, a row at a time, each with the `table` it is from. Names are those of the tables."""
    unhurried(connection)
    for table in (schema.users, schema.members, schema.reads, schema.reactions, schema.messages):
        columns = [column for column in table.c if column.name != "request_hash"]
        query = select(*columns).where(table.c.user_id == user_id).order_by(*table.primary_key)
        query = query.execution_options(yield_per=BATCH)
        for row in connection.execute(query).mappings():
            yield {"table": str(table.name)} | {str(name): value for name, value in row.items()}


class Erasure:
    """`run` blocks. `node` is for the outbox, so that other services hear of it; None without Redis."""

    def __init__(self, engine: Engine, user_id: int, node: str | None, tell: Callable[[int], None]) -> None:
        """`tell` gets the number of messages erased so far."""
        self._engine, self._user_id, self._node, self._tell = engine, user_id, node, tell

    def run(self) -> int:
        """The number of messages whose content is gone. Tokens are void from now on: nothing new comes."""
        self._commit([SetUser(user_id=self._user_id, valid_after=int(time.time()) + 1)])
        self._leave_rooms()
        count = self._delete_messages()
        self._take_back_reactions()
        with self._engine.begin() as connection:
            self._remove_rows(connection)
            self._clean_queues(connection)
        return count

    def _commit(self, commands: Sequence[AnyCommand]) -> None:
        with self._engine.begin() as connection:
            Transaction(connection, self._node).run(commands)

    def _mine(self, table: Table) -> ColumnElement[bool]:
        return table.c.user_id == self._user_id

    def _leave_rooms(self) -> None:
        members = schema.members
        with self._engine.connect() as connection:
            query = select(members.c.conversation_id).where(self._mine(members))
            rooms = connection.scalars(query.where(members.c.state == State.ACTIVE.value)).all()
        for room in rooms:
            self._commit([SetMember(conversation_id=room, user_id=self._user_id, state=State.REMOVED)])

    def _delete_messages(self) -> int:
        messages, count, last = schema.messages, 0, 0
        while True:
            with self._engine.connect() as connection:
                unhurried(connection)
                left = select(messages.c.id).where(self._mine(messages), messages.c.deleted_at.is_(None))
                query = left.where(messages.c.id > last).order_by(messages.c.id).limit(BATCH)
                ids = connection.scalars(query).all()
            if not ids:
                return count
            self._commit([Delete(message_id=id) for id in ids])
            count, last = count + len(ids), ids[-1]
            self._tell(count)

    def _take_back_reactions(self) -> None:
        messages, reactions = schema.messages, schema.reactions
        with self._engine.connect() as connection:
            query = select(reactions.c.message_id, reactions.c.emoji, messages.c.chat_conversation_id)
            joined = query.join(messages, messages.c.id == reactions.c.message_id)
            given = connection.execute(joined.where(self._mine(reactions))).all()
        for id, emoji, place in given:
            back = React(message_id=id, conversation_id=place, user_id=self._user_id, emoji=emoji, on=False)
            self._commit([back])

    def _remove_rows(self, connection: Connection) -> None:
        messages = schema.messages
        nameless = {"client_id": None, "request_hash": _NO_HASH}
        connection.execute(update(messages).where(self._mine(messages)).values(nameless))
        for table in (schema.reactions, schema.reads, schema.members):
            connection.execute(delete(table).where(self._mine(table)))

    def _clean_queues(self, connection: Connection) -> None:
        """What is still to be told to others, without what the user said."""
        outbox, webhooks = schema.outbox, schema.webhooks
        for id, payloads in connection.execute(select(outbox.c.id, outbox.c.payloads)).all():
            lines = payloads.split(b"\n")
            kept = [line for line in lines if not self._says(json.loads(line))]
            if len(kept) < len(lines):
                changed = update(outbox).values(payloads=b"\n".join(kept)) if kept else delete(outbox)
                connection.execute(changed.where(outbox.c.id == id))
        for id, body in connection.execute(select(webhooks.c.id, webhooks.c.body)).all():
            if self._says(json.loads(body)):
                connection.execute(delete(webhooks).where(webhooks.c.id == id))

    def _says(self, told: Any) -> bool:
        """Whether the user's own words are in an event, however deep."""
        if isinstance(told, list):
            return any(map(self._says, told))
        if not isinstance(told, dict):
            return False
        mine = told.get("user_id") == self._user_id and told.get("content") is not None
        return mine or any(map(self._says, told.values()))


def forget(engine: Engine) -> bool:
    """Write an SQLite file anew, without the bytes of what was erased; whether its log is empty, too.

    PostgreSQL frees them when it vacuums; VACUUM FULL overwrites.
    """
    if not is_sqlite(engine):
        return True
    pooled = engine.raw_connection()
    try:
        driver: Any = pooled.driver_connection
        driver.execute("VACUUM")
        return not driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        pooled.close()
