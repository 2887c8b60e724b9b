"""Conversations against a model of them: whatever three users and a backend do, in whatever groups, the
database, the answers and what a follower is given are what the model says.

The same examples each time, so that a red build means a change and not luck. CHATD_TEST_EXAMPLES=1000 looks
further, at random.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import UNSET

from chatd.config import Database
from chatd.core.errors import ChatError
from chatd.core.model import Position, State
from chatd.store.database import Store, open_store
from chatd.store.read import lookups, snapshots
from chatd.store.read.snapshots import Entry, Snapshot
from chatd.store.write.commands import (
    Create,
    Created,
    CursorMoved,
    Delete,
    Edit,
    MoveCursor,
    React,
    Rights,
    SetMember,
)
from chatd.store.write.transaction import Transaction

FURTHER = int(os.environ.get("CHATD_TEST_EXAMPLES", "0"))
MUTED = "2999-01-01T00:00:00.000000Z"

USERS, PLACES = st.integers(1, 3), st.integers(1, 2)
RIGHTS = st.sampled_from(Rights)
CONTENTS, KEYS, EMOJIS = st.sampled_from("ab"), st.sampled_from([None, "k", "l"]), st.sampled_from("👍👎")
WHICH = st.integers(0, 10)  # of the messages there are, by the remainder


@functools.cache
def template() -> Path:
    """An empty database: to copy it is quicker than to make it."""
    file = Path(tempfile.mkdtemp()) / "empty.db"
    atexit.register(shutil.rmtree, file.parent)
    open_store(Database(url=f"sqlite:///{file}")).close()
    return file


class Member:
    def __init__(self, state: State) -> None:
        self.state, self.role, self.muted = state, None, False


class Message:
    def __init__(self, id: int, place: int, user: int, content: str) -> None:
        self.id, self.place, self.user = id, place, user
        self.content: str | None = content
        self.reactions: dict[str, list[int]] = {}


class Model:
    """What a reader of the protocol expects. Answers are an error's code, or what the change was."""

    def __init__(self) -> None:
        self.messages: dict[int, Message] = {}
        self.logs: dict[int, list[int]] = {1: [], 2: []}  # the message of each change
        self.members: dict[tuple[int, int], Member] = {}
        self.cursors: dict[tuple[int, int], tuple[int, int]] = {}
        self.keys: dict[tuple[int, int, str], tuple[str, int, int]] = {}  # (content, id, seq)

    def may(self, place: int, user: int, rights: Rights) -> bool:
        if rights is Rights.TRUSTED:
            return True
        member = self.members.get((place, user))
        return member.state is State.ACTIVE if member else rights is Rights.ENTITLED

    def muted(self, place: int, user: int, rights: Rights) -> bool:
        member = self.members.get((place, user))
        return rights is not Rights.TRUSTED and member is not None and member.muted

    def change(self, message: Message) -> tuple[int, int]:
        self.logs[message.place].append(message.id)
        return message.id, len(self.logs[message.place])

    def create(self, one: Create) -> Any:
        place, user = one.conversation_id, one.user_id
        if not self.may(place, user, one.rights):
            return "not_found"
        key = (place, user, one.client_id or "")
        if one.client_id and key in self.keys:
            content, id, seq = self.keys[key]
            return (id, seq, True) if content == one.content else "conflict"
        if self.muted(place, user, one.rights):
            return "muted"
        if one.rights is Rights.TRUSTED and (place, user) not in self.members:
            self.members[place, user] = Member(State.ACTIVE)
        id = len(self.messages) + 1
        self.messages[id] = Message(id, place, user, one.content)
        id, seq = self.change(self.messages[id])
        if one.client_id:
            self.keys[key] = (one.content, id, seq)
        return id, seq, False

    def visible(self, one: Edit | Delete | React) -> Message | str:
        message = self.messages[one.message_id]
        if one.user_id is not None:
            if not self.may(message.place, one.user_id, one.rights):
                return "not_found"
            if self.muted(message.place, one.user_id, one.rights):
                return "muted"
        return message if message.content is not None else "not_found"

    def own(self, one: Edit | Delete) -> Message | str:
        message = self.visible(one)
        if isinstance(message, str) or one.user_id in (None, message.user):
            return message
        member = self.members.get((message.place, one.user_id or 0))
        return message if member is not None and member.role == "moderator" else "forbidden"

    def edit(self, one: Edit) -> Any:
        message = self.own(one)
        if isinstance(message, str):
            return message
        assert isinstance(one.content, str)
        message.content = one.content
        return self.change(message)

    def delete(self, one: Delete) -> Any:
        message = self.own(one)
        if isinstance(message, str):
            return message
        message.content, message.reactions = None, {}
        return self.change(message)

    def react(self, one: React) -> Any:
        message = self.visible(one)
        if isinstance(message, str):
            return message
        users = message.reactions.get(one.emoji, [])
        if (one.user_id in users) is one.on:
            return message.id, len(self.logs[message.place])
        users = [*users, one.user_id] if one.on else [user for user in users if user != one.user_id]
        message.reactions = {**message.reactions, one.emoji: users}
        return self.change(message)

    def set_member(self, one: SetMember) -> Any:
        key = (one.conversation_id, one.user_id)
        member = self.members.setdefault(key, Member(one.state))
        member.state, member.role, member.muted = one.state, one.role, bool(one.muted_until)  # type: ignore[assignment]
        return None

    def move(self, one: MoveCursor) -> Any:
        if not self.may(one.conversation_id, one.user_id, one.rights):
            return "not_found"
        key = (one.conversation_id, one.user_id)
        head = max((m.id for m in self.messages.values() if m.place == one.conversation_id), default=0)
        before = self.cursors.get(key, (0, 0))
        read = max(before[0], min(one.read, head))
        self.cursors[key] = (read, max(before[1], read, min(one.delivered, head)))
        return self.cursors[key]

    def unread(self, place: int, user: int) -> int:
        read, _ = self.cursors.get((place, user), (0, 0))
        there = [m for m in self.messages.values() if m.place == place and m.content is not None]
        return sum(m.id > read and m.user != user for m in there)


class Chats(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        file = shutil.copy(template(), self._directory.name)
        self.store = Store(Database(url=f"sqlite:///{file}", readers=1))
        self.known = 0  # messages that somebody can have heard of
        self.model = Model()
        self.waiting: list[tuple[Any, Any]] = []  # (command, the answer expected)
        self.committed = {1: 0, 2: 0}  # changes that were told live
        self.marks: dict[int, list[str | None]] = {1: [], 2: []}  # of them
        # Both conversations are there: what makes one is other tests' subject.
        for place in (1, 2):
            self._wait(
                SetMember(conversation_id=place, user_id=1, state=State.ACTIVE, role=None, muted_until=None)
            )
        self.commit()

    def teardown(self) -> None:
        self.store.close()
        self._directory.cleanup()

    def _wait(self, command: Any) -> None:
        match command:
            case Create():
                answer = self.model.create(command)
            case Edit():
                answer = self.model.edit(command)
            case Delete():
                answer = self.model.delete(command)
            case React():
                answer = self.model.react(command)
            case SetMember():
                answer = self.model.set_member(command)
            case _:
                answer = self.model.move(command)
        self.waiting.append((command, answer))

    def _message(self, which: int) -> Message:
        return self.model.messages[1 + which % self.known]

    # What they do.

    @rule(place=PLACES, user=USERS, content=CONTENTS, key=KEYS, rights=RIGHTS)
    def post(self, place: int, user: int, content: str, key: str | None, rights: Rights) -> None:
        self._wait(Create(conversation_id=place, user_id=user, content=content, client_id=key, rights=rights))

    @precondition(lambda self: self.known)
    @rule(which=WHICH, user=st.none() | USERS, content=CONTENTS, rights=RIGHTS)
    def edit(self, which: int, user: int | None, content: str, rights: Rights) -> None:
        self._wait(Edit(message_id=self._message(which).id, user_id=user, content=content, rights=rights))

    @precondition(lambda self: self.known)
    @rule(which=WHICH, user=st.none() | USERS, rights=RIGHTS)
    def delete(self, which: int, user: int | None, rights: Rights) -> None:
        self._wait(Delete(message_id=self._message(which).id, user_id=user, rights=rights))

    @precondition(lambda self: self.known)
    @rule(which=WHICH, user=USERS, emoji=EMOJIS, on=st.booleans(), rights=RIGHTS)
    def react(self, which: int, user: int, emoji: str, on: bool, rights: Rights) -> None:
        message = self._message(which)
        one = React(
            message_id=message.id,
            conversation_id=message.place,
            user_id=user,
            emoji=emoji,
            on=on,
            rights=rights,
        )
        self._wait(one)

    @rule(
        place=PLACES,
        user=USERS,
        state=st.sampled_from(State),
        role=st.sampled_from([None, "moderator"]),
        muted=st.sampled_from([None, None, MUTED]),
    )
    def set_member(self, place: int, user: int, state: State, role: str | None, muted: str | None) -> None:
        self._wait(SetMember(conversation_id=place, user_id=user, state=state, role=role, muted_until=muted))

    @rule(place=PLACES, user=USERS, read=WHICH, delivered=WHICH, rights=RIGHTS)
    def move(self, place: int, user: int, read: int, delivered: int, rights: Rights) -> None:
        # In a transaction of its own: the cursors of a group are held against what was there before it.
        self.commit()
        self._wait(
            MoveCursor(conversation_id=place, user_id=user, read=read, delivered=delivered, rights=rights)
        )
        self.commit()

    @rule()
    def commit(self) -> None:
        waiting, self.waiting = self.waiting, []
        self.known = len(self.model.messages)
        with self.store._writing.begin() as connection:
            answers, group = Transaction(connection, None).run([command for command, _ in waiting])
        assert [_plain(answer) for answer in answers] == [expected for _, expected in waiting]
        for change in group.changes:
            self.committed[change.conversation_id] += 1
            self.marks[change.conversation_id].append(change.mark)
            assert change.seq == self.committed[change.conversation_id], "told live, in order, each once"
            told = msgspec.json.decode(change.payload)
            assert told["id"] == self.model.logs[change.conversation_id][change.seq - 1]

    # What is true then.

    @precondition(lambda self: not self.waiting)
    @rule(
        place=PLACES,
        user=USERS,
        after=st.none() | st.integers(0, 12),
        entitled=st.booleans(),
        proof=st.sampled_from(["none", "its own", "another"]),
    )
    def enter(self, place: int, user: int, after: int | None, entitled: bool, proof: str) -> None:
        """A mark decides, and the epoch is not looked at: the changes that have it are the ones that follow."""
        marks = [None, *self.marks[place]]
        own = marks[after] if after is not None and after < len(marks) else None
        mark = {"none": UNSET, "its own": own, "another": "another"}[proof]
        epoch = None if mark is UNSET else "another"
        with self.store._reading.begin() as connection:
            entry = Entry(user, [(place, Position(after, mark), entitled)], epoch, 100)
            (found,) = snapshots.snapshots(connection, [entry])
        snapshot = found[place]
        if not self.model.may(place, user, Rights.ENTITLED if entitled else Rights.MEMBER):
            assert not isinstance(snapshot, Snapshot)
            return
        assert isinstance(snapshot, Snapshot)
        log = self.model.logs[place]
        assert (snapshot.seq, snapshot.unread) == (len(log), self.model.unread(place, user))
        cursors = {(c.user_id, c.read, c.delivered) for c in snapshot.receipts}
        theirs = {(u, *both) for (p, u), both in self.model.cursors.items() if p == place and any(both)}
        assert cursors == theirs
        if after is None or (after <= len(log) and proof != "another"):
            assert snapshot.recovered
            told = [msgspec.json.decode(change.payload) for change in snapshot.changes]
            missed = list(enumerate(log, 1))[after:] if after is not None else []
            assert [(one["seq"], one["id"]) for one in told] == missed
            for one in told:
                self._same(one)
        else:
            assert not snapshot.recovered

    def _same(self, told: dict[str, Any]) -> None:
        """A change is told with its message as it is now."""
        message = self.model.messages[told["id"]]
        assert (told["user_id"], told["content"]) == (message.user, message.content)
        assert told.get("reactions", {}) == {e: users for e, users in message.reactions.items() if users}

    @precondition(lambda self: not self.waiting)
    @rule(place=PLACES, limit=st.integers(1, 5), before=st.none() | st.integers(1, 12))
    def page(self, place: int, limit: int, before: int | None) -> None:
        with self.store._reading.begin() as connection:
            page = lookups.history(connection, place, before, None, limit)
        there = [id for id, one in self.model.messages.items() if one.place == place]
        older = [id for id in there if before is None or id < before]
        assert [one.id for one in page.messages] == older[-limit:]
        assert page.has_more == (len(older) > limit)

    @invariant()
    def nothing_grows_without_end(self) -> None:
        if len(self.waiting) >= 6:
            self.commit()


def _plain(answer: Any) -> Any:
    match answer:
        case ChatError():
            return answer.code
        case Created():
            return answer.id, answer.seq, answer.duplicate
        case CursorMoved():
            return answer.read, answer.delivered
        case _:
            return (answer.id, answer.seq) if hasattr(answer, "seq") else None


TestChats = Chats.TestCase
TestChats.pytestmark = [pytest.mark.slow]
# Without a search for the shortest example, which takes minutes: a further look does that.
PHASES = list(Phase) if FURTHER else [Phase.generate]
TestChats.settings = settings(
    max_examples=FURTHER or 150,
    stateful_step_count=50,
    deadline=None,
    derandomize=not FURTHER,
    phases=PHASES,
)
