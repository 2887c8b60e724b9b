"""What happened in a run: every request with its outcome, and everything that every client was given.

The workload writes it, the checker reads it, `crowd` hands it over as msgpack. Times are seconds of the
machine's monotonic clock, the same in all its processes.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import msgspec
from msgspec import Struct

PADDING = "."  # what makes a long message long: it stands behind a body and is not part of it


class Outcome(StrEnum):
    """As Jepsen has it: a request that was not answered is neither done nor failed, it is *unknown*."""

    OK = "ok"
    FAIL = "fail"  # refused for good: it has not happened and will not
    INFO = "info"  # a timeout, a lost connection, `unavailable`: it may have happened, or happen yet


class Kind(StrEnum):
    POST = "post"
    EDIT = "edit"
    DELETE = "delete"
    ADD = "add"
    REMOVE = "remove"


class Attempt(Struct, array_like=True):
    """One request from its start to its end. The attempts of one operation share `body`.

    `body` is the content that it stores, unique in the run; for a post it is the `client_id`, too. For a
    delete, an added or a removed member it is a mere name. `user` is who posts, or who is added or removed.
    """

    kind: Kind
    conversation: int
    user: int
    body: str
    invoked: float
    ended: float
    outcome: Outcome
    id: int = 0  # of the message: what was answered to a post, what was aimed at by an edit or a delete
    seq: int = 0  # that was answered
    duplicate: bool = False
    code: str = ""  # of the refusal, or what broke
    of: str = ""  # the `client_id` of the message that an edit or a delete aims at: its id may be given twice


class Seen(Struct, array_like=True):
    """A change as a client got it. `event` is `message`, `message.updated` or `message.deleted`."""

    seq: int
    id: int
    event: str
    body: str | None  # its content
    client_id: str | None = None  # names the message in all histories, which an id does not
    mark: str | None = None  # of the change, as the server gave it


class Answered(Struct, array_like=True, tag=True):
    """`subscribed`, or the room's part of `ready`. `after` is what was asked for: the cursor of the client.

    `mark` is the one of the change with the number `seq`.
    """

    at: float
    conversation: int
    after: int | None
    recovered: bool
    seq: int
    changes: list[Seen]
    asked: bool = True  # False: the server sent it by itself, to make the client start over
    mark: str | None = None


class Heard(Struct, array_like=True, tag=True):
    """A live change."""

    at: float
    conversation: int
    seen: Seen


class Unsubscribed(Struct, array_like=True, tag=True):
    """The server ended the subscription, or refused it."""

    at: float
    conversation: int
    code: str


class Connected(Struct, array_like=True, tag=True):
    """A new connection: `hello` has come."""

    at: float


class Disconnected(Struct, array_like=True, tag=True):
    """`code` is 0 where the connection broke without a close frame."""

    at: float
    code: int


Record = Answered | Heard | Unsubscribed | Connected | Disconnected


class Client(Struct):
    """One client over all its connections, in the order in which things came to it.

    `outsider`: may never hear anything. `cursors` are what it held at the end, by conversation: rooms that it
    was in then. `frozen` are the spans in which it was stopped by the test, as (from, to). `proves`: it tells
    the server which history its cursors are of; one that sends a mere number cannot be told from another.
    `follows_timeline`: it proves that by PostgreSQL's timeline alone, and must start over after each failover.
    """

    name: str
    user: int
    outsider: bool
    records: list[Record]
    cursors: dict[int, int]
    frozen: list[tuple[float, float]]
    proves: bool = True
    follows_timeline: bool = False


class Logged(Struct, array_like=True):
    """A row of the conversation's log in the database. `kind` is created, edited or deleted."""

    seq: int
    kind: str
    id: int
    mark: str | None = None


class Stored(Struct, array_like=True):
    """A row of a message in the database. `content` is None once it is deleted."""

    id: int
    user: int
    seq: int
    client_id: str | None
    content: str | None


class Conversation(Struct):
    """What the database holds in the end, rows as they are: nothing here is unique by construction."""

    id: int
    last_seq: int
    log: list[Logged]
    messages: list[Stored]


class Past(Struct):
    """A history that is no more: the database went back to an older copy, or to a standby that lagged.

    `held` is what the database held when it was left, `copy` what the next history began with. From `at` on,
    what was done before may be gone; a request that was made after `until` was answered from the next history.
    """

    at: float
    until: float
    held: list[Conversation]
    copy: list[Conversation]


class Picture(Struct, array_like=True):
    """Who was online for somebody (`whose`) some time after a fault, and who was connected in truth."""

    at: float
    whose: str
    seen: list[int]
    true: list[int]


class History(Struct):
    """A whole run. `settled`: when the load had ended and every client had had its time to catch up.

    `final` is what the database holds in the end, `past` what it held whenever it went back, oldest first.
    """

    attempts: list[Attempt]
    clients: list[Client]
    final: list[Conversation]
    settled: float
    past: list[Past] = []
    pictures: list[Picture] = []


def save(path: Path, what: Struct) -> None:
    path.write_bytes(msgspec.msgpack.encode(what))


def load(path: Path) -> History:
    return msgspec.msgpack.decode(path.read_bytes(), type=History)
