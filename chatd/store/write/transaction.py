"""One transaction: decides a group of commands in their order, numbers the new changes, and writes the rows.

It runs in the writer's thread. It first locks the conversations in the order of their ids. So the order of
commits, of `seq` and of message ids is the same, and two nodes cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import UNSET, Struct
from sqlalchemy import Connection

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
from chatd.store.write.conversations import Conversations
from chatd.store.write.cursors import Cursors
from chatd.store.write.fencing import Fencing
from chatd.store.write.idempotency import Idempotency
from chatd.store.write.members import Members
from chatd.store.write.messages import Messages
from chatd.store.write.outgoing import ByUser, Outgoing
from chatd.store.write.reactions import Reactions
from chatd.store.write.users import Users

Row = dict[str, Any]


class Step(Struct):
    """A command that is granted. `row` is the message that it created or changed; for a retry, the earlier one.

    `previous` is the mark of the conversation's change before this one.
    """

    kind: Kind
    seq: int
    row: Row
    previous: str | None = None
    duplicate: bool = False


class Transaction:
    """Executes one group of commands.

    `run` returns a result or a ChatError for each; it raises only the database's errors.
    """

    def __init__(self, connection: Connection, node: str | None, wanted: frozenset[str] = frozenset()) -> None:
        """`node`: see `Outgoing`. `wanted`: the events that the webhook wants."""
        self._connection = connection
        self._now = now()
        self._outgoing = Outgoing(connection, node, self._now, wanted)
        self._steps: list[Step] = []
        self._conversations = Conversations(connection, self._now)
        self._messages = Messages(connection, self._now)
        self._fencing = Fencing(connection)
        self._idempotency = Idempotency(connection)
        self._members = Members(connection, self._now)
        self._users = Users(connection)
        self._cursors = Cursors(connection, self._now)
        self._reactions = Reactions(connection, self._now)

    def run(
        self, commands: Sequence[AnyCommand], settled: Iterable[int] = ()
    ) -> tuple[list[Result | ChatError], Group]:
        """Execute the commands. `settled`: ids of published outbox rows, which this transaction removes."""
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
        self._conversations.read(commands)
        self._members.read({pair for command in commands for pair in self._member_pairs(command)})
        named = [c for c in commands if isinstance(c, Create) and c.client_id is not None]
        self._idempotency.read(named, self._conversations.rows)
        self._messages.read({c.message_id for c in commands if isinstance(c, Edit | Delete | React)})
        self._reactions.read([c for c in commands if isinstance(c, React)])
        self._cursors.read([c for c in commands if isinstance(c, MoveCursor)])
        self._users.read([c for c in commands if isinstance(c, SetUser)])

    def _member_pairs(self, command: AnyCommand) -> list[tuple[int, int]]:
        conversation = self._conversations.of(command)
        if conversation is None or isinstance(command, Notify | Fence) or command.user_id is None:
            return []
        return [(conversation, command.user_id)]

    # Deciding. Each verdict takes the earlier commands of the group into account.

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
        if command.reply_to is not None and not self._is_here(command.reply_to, command):
            raise BadRequest("There is no such message in this conversation.", field="reply_to")
        if command.rights is Rights.TRUSTED and member not in self._members:
            self._members.enter_quietly(member, self._conversations[command.conversation_id])
        row = self._messages.create(command, self._conversations[command.conversation_id]["last_seq"] + 1)
        self._idempotency.remember(command, row)
        return self._number(Kind.CREATED, row, command)

    def _is_here(self, message_id: int, command: Create) -> bool:
        return self._conversations.of_message(message_id) == command.conversation_id

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
        if summary is None:  # nothing changes
            return Changed(row["id"], self._conversations[row["chat_conversation_id"]]["last_seq"])
        return self._alter(Kind.REACTED, row | {"reactions": summary or None}, command)

    def _alter(self, kind: Kind, row: Row, command: Edit | Delete | React) -> Step:
        self._messages.change(row)
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
            self._conversations.touch(command.conversation_id)
        return MemberSet(changed=moved)

    def _number(self, kind: Kind, row: Row, command: ByUser) -> Step:
        seq, previous = self._conversations.number(row["chat_conversation_id"])
        step = Step(kind, seq, row, previous)
        self._steps.append(step)
        if command.rights is not Rights.TRUSTED:  # no webhook for what the backend did itself
            self._outgoing.tell_message(step.kind, step.seq, row, command)
        return step

    # Writing.

    def _write(self) -> None:
        self._messages.insert()
        self._reactions.write()
        self._reactions.refill(self._messages.changed.values())
        self._messages.update()
        self._members.write()
        if self._steps:
            logged = [self._logged(step) for step in self._steps]
            self._connection.execute(statements.INSERT_CHANGES, logged)
        self._conversations.write()
        self._cursors.write()
        self._users.write()

    def _logged(self, step: Step) -> Row:
        return {
            "conversation_id": step.row["chat_conversation_id"],
            "seq": step.seq,
            "kind": step.kind.value,
            "message_id": step.row["id"],
            "mark": self._conversations.mark,
        }

    def _change(self, step: Step) -> Change:
        id = step.row["chat_conversation_id"]
        payload = change_payload(step.kind, step.seq, message(step.row), self._conversations.mark)
        version = self._conversations[id]["removed_version"]
        return Change(id, step.seq, step.kind, payload, version, self._conversations.mark, step.previous)

    @staticmethod
    def _result(verdict: Step | Result | ChatError) -> Result | ChatError:
        if not isinstance(verdict, Step):
            return verdict
        row = verdict.row
        if verdict.kind is Kind.CREATED:
            return Created(row["id"], verdict.seq, row["created_at"], row["client_id"], verdict.duplicate)
        return Changed(row["id"], verdict.seq)
