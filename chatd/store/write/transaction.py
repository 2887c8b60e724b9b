"""One transaction: decide a group of commands in the order they came, number what is new, write the rows.

Synchronous, in the writer's thread. The conversations are locked first, in id order, so commit order, `seq`
order and id order are the same and two nodes cannot deadlock.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import UNSET, Struct
from sqlalchemy import Connection, Executable, Select

from chatd.core.errors import BadRequest, ChatError, NotFound
from chatd.core.model import Change, Group, Kind, now
from chatd.core.protocol import change_payload
from chatd.store.rows import message
from chatd.store.write import permits, statements
from chatd.store.write.commands import (
    AnyCommand,
    Changed,
    Create,
    Created,
    CursorMoved,
    Delete,
    Edit,
    Fence,
    FenceSet,
    MemberSet,
    MoveCursor,
    Notified,
    Notify,
    React,
    Result,
    Rights,
    SetMember,
    SetUser,
)
from chatd.store.write.cursors import Cursors
from chatd.store.write.fencing import Fencing
from chatd.store.write.idempotency import Idempotency
from chatd.store.write.members import Members
from chatd.store.write.outgoing import ByUser, Outgoing
from chatd.store.write.reactions import Reactions
from chatd.store.write.users import Users

Row = dict[str, Any]
MARK_BYTES = 6  # of chance: two histories do not come upon the same by accident


class Step(Struct):
    """A granted command. `row` is the message it made, changed or, for a retry, found.

    `previous` is the mark of the change before it.
    """

    kind: Kind
    seq: int
    row: Row
    previous: str | None = None
    duplicate: bool = False


class Transaction:
    """`run` answers each command on its own; only the database's own errors leave it."""

    def __init__(self, connection: Connection, node: str | None, told: frozenset[str] = frozenset()) -> None:
        """`told`: events that the webhook wants."""
        self._connection = connection
        self._dialect = connection.dialect.name
        self._now = now()
        self._outgoing = Outgoing(connection, node, self._now, told)
        self._mark = secrets.token_urlsafe(MARK_BYTES)
        self._where: dict[int, int] = {}  # message id → conversation id
        self._conversations: dict[int, Row] = {}
        self._touched: set[int] = set()
        self._messages: dict[int, Row] = {}
        self._created: list[Row] = []
        self._changed: dict[int, Row] = {}
        self._steps: list[Step] = []
        self._fencing = Fencing(connection)
        self._idempotency = Idempotency(connection)
        self._members = Members(connection, self._now)
        self._users = Users(connection)
        self._cursors = Cursors(connection, self._now)
        self._reactions = Reactions(connection, self._now)

    def run(
        self, commands: Sequence[AnyCommand], settled: Iterable[int] = ()
    ) -> tuple[list[Result | ChatError], Group]:
        """`settled` are outbox rows that the bus has taken; they go with this transaction."""
        self._read(commands)
        verdicts = [self._decide(command) for command in commands]
        self._write()
        changes = [self._change(step) for step in self._steps]
        self._outgoing.settle(settled)
        outbox_id = self._outgoing.fill_outbox(changes)
        group = Group(
            changes=changes,
            members=self._members.changes,
            outbox_id=outbox_id,
            users=self._users.changes,
            notices=self._cursors.notices(),
            hooked=self._outgoing.fill_webhooks(self._members.changes),
        )
        return [self._result(verdict) for verdict in verdicts], group

    # Reading, in the order of the locks.

    def _read(self, commands: Sequence[AnyCommand]) -> None:
        self._fencing.read(commands)
        aimed = [command for command in commands if isinstance(command, Edit | Delete | React)]
        replies = [c.reply_to for c in commands if isinstance(c, Create) and c.reply_to is not None]
        self._where = self._find_conversations([*(command.message_id for command in aimed), *replies])
        self._lock_conversations(commands)
        self._members.read({pair for command in commands for pair in self._member_pairs(command)})
        named = [c for c in commands if isinstance(c, Create) and c.client_id is not None]
        self._idempotency.read(named, self._conversations)
        self._read_messages({command.message_id for command in aimed})
        self._reactions.read([c for c in commands if isinstance(c, React)])
        self._cursors.read([c for c in commands if isinstance(c, MoveCursor)])
        self._users.read([c for c in commands if isinstance(c, SetUser)])

    def _find_conversations(self, ids: Sequence[int]) -> dict[int, int]:
        if not ids:
            return {}
        found = self._connection.execute(statements.CONVERSATIONS_OF_MESSAGES, {"ids": list(set(ids))})
        return {row.id: row.chat_conversation_id for row in found}

    def _conversation_of(self, command: AnyCommand) -> int | None:
        if isinstance(command, Edit | Delete | React):
            return self._where.get(command.message_id)
        return None if isinstance(command, SetUser | Notify | Fence) else command.conversation_id

    def _lock_conversations(self, commands: Sequence[AnyCommand]) -> None:
        """All of them, in id order; those that a command may make are made first, in the same order."""
        numbering = [command for command in commands if not isinstance(command, MoveCursor)]
        ids = {id for command in numbering if (id := self._conversation_of(command)) is not None}
        if not ids:
            return
        if self._dialect == "sqlite":  # one lock for everything, which is ours already: look first
            self._conversations = self._rows(statements.LOCK_CONVERSATIONS, {"ids": list(ids)}, "id")
            missing = self._to_make(commands) - self._conversations.keys()
        else:
            wanted = list(self._to_make(commands))
            there = (
                self._connection.scalars(statements.EXISTING_CONVERSATIONS, {"ids": wanted}) if wanted else ()
            )
            missing = set(wanted).difference(there)
        if missing:
            rows = [{"id": id, "updated_at": self._now} for id in sorted(missing)]
            self._connection.execute(statements.CREATE_CONVERSATIONS[self._dialect], rows)
        if missing or not self._conversations:
            self._conversations = self._rows(statements.LOCK_CONVERSATIONS, {"ids": list(ids)}, "id")

    @staticmethod
    def _to_make(commands: Sequence[AnyCommand]) -> set[int]:
        return {
            command.conversation_id
            for command in commands
            if isinstance(command, SetMember)
            or (isinstance(command, Create) and command.rights is not Rights.MEMBER)
        }

    def _member_pairs(self, command: AnyCommand) -> list[tuple[int, int]]:
        conversation = self._conversation_of(command)
        if conversation is None or isinstance(command, Notify | Fence) or command.user_id is None:
            return []
        return [(conversation, command.user_id)]

    def _read_messages(self, ids: set[int]) -> None:
        if ids:
            self._messages = self._rows(statements.MESSAGES, {"ids": list(ids)}, "id")

    def _rows(self, query: Select[Any], parameters: Row, *key: str) -> dict[Any, Row]:
        rows = [dict(row) for row in self._connection.execute(query, parameters).mappings()]
        return {row[key[0]] if len(key) == 1 else tuple(row[k] for k in key): row for row in rows}

    # Deciding. Each verdict sees what the commands before it in the group did.

    def _decide(self, command: AnyCommand) -> Step | Result | ChatError:
        try:
            match command:
                case Create():
                    return self._create(command)
                case Edit():
                    return self._edit(command)
                case Delete():
                    return self._delete(command)
                case React():
                    return self._react(command)
                case MoveCursor():
                    return self._move_cursor(command)
                case SetMember():
                    return self._set_member(command)
                case SetUser():
                    return self._users.set(command)
                case Notify():
                    self._outgoing.notifications.append(command)
                    return Notified()
                case Fence():
                    return FenceSet()
        except ChatError as refusal:
            return refusal

    def _create(self, command: Create) -> Step:
        self._fencing.check(command)
        self._check_rights(command)
        if earlier := self._idempotency.find(command):
            return Step(Kind.CREATED, earlier["seq"], earlier, duplicate=True)
        member = (command.conversation_id, command.user_id)
        self._members.check_mute(member, command.rights)
        if command.reply_to is not None and self._where.get(command.reply_to) != command.conversation_id:
            raise BadRequest("There is no such message in this conversation.", field="reply_to")
        if command.rights is Rights.TRUSTED and member not in self._members:
            self._members.enter_quietly(member, self._conversations[command.conversation_id])
        row = self._new_row(command)
        self._created.append(row)
        self._idempotency.remember(command, row)
        return self._number(Kind.CREATED, row, command)

    def _new_row(self, command: Create) -> Row:
        return {
            "chat_conversation_id": command.conversation_id,
            "user_id": command.user_id,
            "type": command.type,
            "content": command.content,
            "meta": command.meta,
            "created_at": self._now,
            "updated_at": self._now,
            "seq": self._conversations[command.conversation_id]["last_seq"] + 1,
            "client_id": command.client_id,
            "request_hash": command.request_hash(),
            "reply_to": command.reply_to,
            "edited_at": None,
            "deleted_at": None,
            "reactions": None,
        }

    def _edit(self, command: Edit) -> Step:
        row = permits.own(self._members, command, self._messages.get(command.message_id))
        fresh = {"content": command.content, "meta": command.meta}
        fresh = {key: value for key, value in fresh.items() if value is not UNSET}
        return self._alter(Kind.EDITED, row | fresh | {"edited_at": self._now}, command)

    def _delete(self, command: Delete) -> Step:
        row = permits.own(self._members, command, self._messages.get(command.message_id))
        self._reactions.clear(row["id"])
        gone = {"content": None, "meta": None, "reactions": None, "deleted_at": self._now}
        return self._alter(Kind.DELETED, row | gone, command)

    def _react(self, command: React) -> Step | Changed:
        row = permits.visible(self._members, command, self._messages.get(command.message_id))
        summary = self._reactions.toggle(command, row["reactions"])
        if summary is None:  # it was so already
            return Changed(row["id"], self._conversations[row["chat_conversation_id"]]["last_seq"])
        return self._alter(Kind.REACTED, row | {"reactions": summary or None}, command)

    def _alter(self, kind: Kind, row: Row, command: Edit | Delete | React) -> Step:
        self._messages[row["id"]] = self._changed[row["id"]] = row
        return self._number(kind, row, command)

    def _check_rights(self, command: Create) -> None:
        if command.conversation_id not in self._conversations:
            raise NotFound(field="conversation_id")
        permits.check_entry(self._members, (command.conversation_id, command.user_id), command.rights)

    def _move_cursor(self, command: MoveCursor) -> CursorMoved:
        permits.check_entry(self._members, (command.conversation_id, command.user_id), command.rights)
        return self._cursors.move(command)

    def _set_member(self, command: SetMember) -> MemberSet:
        written, moved = self._members.set(command, self._conversations[command.conversation_id])
        if written:
            self._touched.add(command.conversation_id)
        return MemberSet(changed=moved)

    def _number(self, kind: Kind, row: Row, command: ByUser) -> Step:
        conversation = self._conversations[row["chat_conversation_id"]]
        conversation["last_seq"] += 1
        self._touched.add(conversation["id"])
        step = Step(kind, conversation["last_seq"], row, conversation["mark"])
        conversation["mark"] = self._mark
        self._steps.append(step)
        if command.rights is not Rights.TRUSTED:  # of what it does itself the backend knows
            self._outgoing.tell_message(step.kind, step.seq, row, command)
        return step

    # Writing.

    def _write(self) -> None:
        if self._created:
            self._insert_messages(self._created)
        self._reactions.write()
        self._reactions.refill(self._changed.values())
        for row in self._changed.values():
            self._connection.execute(statements.UPDATE_MESSAGE, self._altered(row))
        self._members.write()
        self._execute(statements.INSERT_CHANGES, [self._logged(step) for step in self._steps])
        touched = [self._advanced(self._conversations[id]) for id in sorted(self._touched)]
        self._execute(statements.ADVANCE_CONVERSATIONS[self._dialect], touched)
        self._cursors.write()
        self._users.write()

    def _insert_messages(self, rows: list[Row]) -> None:
        """Their ids are known at once where nobody else can be writing, else by what the insert returns.

        SQLite gives rows back in no certain order: SQLAlchemy would send a statement for each.
        """
        if self._dialect == "sqlite" and len(rows) > 1:
            last = self._connection.scalar(statements.LAST_MESSAGE_ID) or 0
            for id, row in enumerate(rows, last + 1):
                row["id"] = id
            self._connection.execute(statements.INSERT_NUMBERED_MESSAGES, rows)
            return
        ids = self._connection.scalars(statements.INSERT_MESSAGES, rows).all()
        for row, id in zip(rows, ids, strict=True):
            row["id"] = id

    def _execute(self, statement: Executable, rows: list[Row]) -> None:
        if rows:
            self._connection.execute(statement, rows)

    def _altered(self, row: Row) -> Row:
        names = ("content", "meta", "edited_at", "deleted_at", "reactions")
        return {"key": row["id"], "updated_at": self._now} | {name: row[name] for name in names}

    def _logged(self, step: Step) -> Row:
        return {
            "conversation_id": step.row["chat_conversation_id"],
            "seq": step.seq,
            "kind": step.kind.value,
            "message_id": step.row["id"],
            "mark": self._mark,
        }

    def _advanced(self, row: Row) -> Row:
        marked = {"marked_seq": row["last_seq"], "updated_at": self._now}
        names = ("id", "last_seq", "members_version", "removed_version", "mark")
        return {name: row[name] for name in names} | marked

    def _change(self, step: Step) -> Change:
        id = step.row["chat_conversation_id"]
        payload = change_payload(step.kind, step.seq, message(step.row), self._mark)
        version = self._conversations[id]["removed_version"]
        return Change(id, step.seq, step.kind, payload, version, self._mark, step.previous)

    @staticmethod
    def _result(verdict: Step | Result | ChatError) -> Result | ChatError:
        if not isinstance(verdict, Step):
            return verdict
        row = verdict.row
        if verdict.kind is Kind.CREATED:
            return Created(row["id"], verdict.seq, row["created_at"], row["client_id"], verdict.duplicate)
        return Changed(row["id"], verdict.seq)
