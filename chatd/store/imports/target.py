"""Writes batches of imported messages: numbers them, and adds them to the log, the heads and the members.

It does in bulk what `write.transaction` does for a post of the backend, but without events: there is nobody to
hear them. The caller has made sure that chatd does not run.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Table, text

from chatd.core.model import Kind, now
from chatd.store import schema
from chatd.store.imports.records import Row
from chatd.store.write import statements
from chatd.store.write.conversations import MARK_BYTES
from chatd.store.write.members import Key, Members

MESSAGE = (
    "id", "chat_conversation_id", "user_id", "type", "content", "meta", "created_at", "updated_at", "seq",
    "client_id", "request_hash", "reply_to", "edited_at", "deleted_at",
)  # fmt: skip
CHANGE = ("conversation_id", "seq", "kind", "message_id", "mark")

# PostgreSQL's sequence does not notice ids that it has not given. It is never set back.
_RAISE_SEQUENCE = text(
    "SELECT setval(name, greatest(nextval(name), :newest))"
    f" FROM pg_get_serial_sequence('{schema.messages.name}', 'id') AS name"
)
_NO_TIMEOUTS = "SET LOCAL statement_timeout = 0"


class Target:
    def __init__(self) -> None:
        self._entered: set[Key] = set()  # authors of whom a row in `chat_members` is known

    def write(self, connection: Connection, rows: Sequence[Row]) -> None:
        """Write new messages, which are in the order of their ids, in the transaction of `connection`."""
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(_NO_TIMEOUTS)
            connection.execute(_RAISE_SEQUENCE, {"newest": rows[-1].id})
        heads = _heads(connection, rows)
        self._enter(connection, rows, heads)
        mark = secrets.token_urlsafe(MARK_BYTES)
        seqs = list(_number(rows, heads, mark))
        stored = schema.Timestamp().bind_processor(connection.dialect)
        as_stored = stored if connection.dialect.name == "sqlite" else _as_it_is
        numbered = list(zip(rows, seqs, strict=True))
        _insert(connection, schema.messages, MESSAGE, (_message(row, seq, as_stored) for row, seq in numbered))
        kind = Kind.CREATED.value
        logged = ((row.conversation_id, seq, kind, row.id, mark) for row, seq in numbered)
        _insert(connection, schema.changes, CHANGE, logged)
        advanced = [heads[id] for id in sorted(heads)]
        connection.execute(statements.ADVANCE_CONVERSATIONS[connection.dialect.name], advanced)

    def _enter(self, connection: Connection, rows: Sequence[Row], heads: dict[int, dict[str, Any]]) -> None:
        """Make the authors members, as a post does. Who has a row already, a banned user, say, keeps it."""
        keys = {(row.conversation_id, row.user_id) for row in rows} - self._entered
        members = Members(connection, now())
        members.read(keys)
        for key in sorted(keys):
            if key not in members:
                members.enter_quietly(key, heads[key[0]])
        members.write()
        self._entered |= keys


def _heads(connection: Connection, rows: Sequence[Row]) -> dict[int, dict[str, Any]]:
    """The conversations of the rows, locked; the missing ones are made."""
    dialect = connection.dialect.name
    ids = sorted({row.conversation_id for row in rows})
    there = set(connection.scalars(statements.EXISTING_CONVERSATIONS, {"ids": ids}))
    made = [{"id": id, "updated_at": now()} for id in ids if id not in there]
    if made:
        connection.execute(statements.CREATE_CONVERSATIONS[dialect], made)
    found = connection.execute(statements.LOCK_CONVERSATIONS, {"ids": ids}).mappings()
    names = ("id", "last_seq", "members_version", "removed_version")
    return {row["id"]: {name: row[name] for name in names} for row in found}


def _number(rows: Sequence[Row], heads: dict[int, dict[str, Any]], mark: str) -> Iterator[int]:
    """The seq of each row. The heads get the date of their last message, by which an inbox is sorted."""
    for row in rows:
        head = heads[row.conversation_id]
        head["last_seq"] += 1
        yield head["last_seq"]
        head["updated_at"] = row.created_at
    for head in heads.values():
        head |= {"mark": mark, "marked_seq": head["last_seq"]}


def _message(row: Row, seq: int, stored: Any) -> tuple[Any, ...]:
    return (
        row.id,
        row.conversation_id,
        row.user_id,
        row.type,
        row.content,
        row.meta,
        stored(row.created_at),
        stored(row.updated_at),
        seq,
        row.client_id,
        row.request_hash,
        row.reply_to,
        stored(row.edited_at),
        stored(row.deleted_at),
    )


def _as_it_is(value: Any) -> Any:
    return value


def _insert(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[tuple[Any, ...]]
) -> None:
    """Insert tuples as the driver takes them: SQLAlchemy's own way would take half of the time of an import."""
    columns = ", ".join(names)
    if connection.dialect.name == "sqlite":
        places = ", ".join("?" for _ in names)
        connection.exec_driver_sql(f"INSERT INTO {table.name} ({columns}) VALUES ({places})", list(rows))
        return
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)
