"""A client of the crowd. It does what the protocol asks of one, but for shorter waits between two tries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Protocol

import trio
from msgspec import Struct

from chatd.auth.tokens import Tokens
from tests.faults import history
from tests.faults.history import (
    Answered,
    Attempt,
    Connected,
    Disconnected,
    Heard,
    Kind,
    Outcome,
    Seen,
    Unsubscribed,
)
from tests.faults.line import Change, Closed, Frame, Line, RoomAnswer

TOKEN_SECONDS = 7 * 24 * 3600  # longer than any clock is stepped
HELLO_SECONDS = 5.0
REPLY_SECONDS = 8.0  # a `send` without an answer is unknown then
# Shorter than the protocol's 0.5 s · 2^n up to 20 s: a run shall not be over before its clients are back.
BACKOFF_FIRST, BACKOFF_MOST = 0.2, 2.0
BACKOFF_CLEARED = 10.0  # seconds past `ready`
ASK_AGAIN = 0.5  # seconds until a room that was refused is asked for again
RESTLESS = (0.5, 3.0)  # seconds that a restless client stays connected
SEND_EVERY = (0.5, 1.5)  # seconds between two messages of a client that sends
# One user in so many is an old client: it sends mere integers, and the epoch.
OLD_EVERY, OLD_NUMBER = 7, 3


class Spec(Struct):
    """Who there is. Users are told apart by number: `room * 1000 + n` is a member of that room."""

    ports: list[int]
    secret: str
    name: str
    source: str  # the address they connect from
    rooms: int
    numbers: list[int]  # of the members of each room that are in this process
    others: int  # the first number of those who are no room's member
    wanderers: int  # clients that are in all rooms at once
    outsiders: int  # clients that try to be where they may not
    silence: float  # seconds without a byte until a connection is given up
    seed: int
    epoch_proves: bool  # an epoch and an integer tell which history a cursor is of
    failovers: bool  # another server may take over: an epoch and an integer are void after that


class Around(Protocol):
    """What a client needs of its crowd."""

    spec: Spec
    tokens: Tokens
    attempts: list[Attempt]
    sending: trio.Event

    def seen(self, room: int, change: Change | Frame) -> Seen: ...


class Member:
    """A client of the rooms that its token opens. `cursors` are kept over all its connections."""

    outsider = False

    def __init__(
        self, crowd: Around, user: int, rooms: list[int], *, restless: bool = False, sends: bool = False
    ) -> None:
        self._crowd, self.user, self.rooms = crowd, user, rooms
        self._restless, self._sends = restless, sends
        self._dice = random.Random(crowd.spec.seed * 1_000_003 + user)
        self.cursors: dict[int, int] = {}
        self.marks: dict[int, str | None] = {}  # of the changes that the cursors stand at
        self._sends_marks = user % OLD_EVERY != OLD_NUMBER
        self.records: list[history.Record] = []
        self._epoch: str | None = None
        self._refs = itertools.count(1)
        self._waiting: dict[int, Callable[[Frame], None]] = {}
        self._asking: dict[
            int, int | None
        ] = {}  # rooms that an answer is due for, and the cursor in the question
        self._unanswered: str | None = None
        self._bodies = itertools.count(1)

    @property
    def name(self) -> str:
        return f"{self._crowd.spec.name}:{self.user}"

    @property
    def state(self) -> str:
        """For a person who wonders why it has not caught up."""
        if not self.records:
            return f"{self.name}, never connected"
        last = self.records[-1]
        return f"{self.name}, {type(last).__name__.lower()} {monotonic() - last.at:.1f} s ago"

    def client(self) -> history.Client:
        proves = self._sends_marks or self._crowd.spec.epoch_proves
        timeline = self._crowd.spec.failovers and not self._sends_marks
        return history.Client(
            self.name, self.user, self.outsider, self.records, self.cursors, [], proves, timeline
        )

    def token(self) -> str:
        return self._crowd.tokens.issue(self.user, TOKEN_SECONDS, self.rooms)

    async def run(self) -> None:
        tries = 0
        await trio.sleep(self._dice.uniform(0, 1))  # not all in the same moment
        while True:
            started = monotonic()
            tries += 1
            code = 0
            try:
                await self._connection()
                tries = 0  # it left by itself
            except* Closed as group:
                code = _closed_with(group)
            except* OSError:
                pass  # nobody listens
            if self.records and not isinstance(self.records[-1], Disconnected):
                self.records.append(Disconnected(monotonic(), code))
            if monotonic() - started > BACKOFF_CLEARED:
                tries = 0
            await trio.sleep(self._dice.uniform(0, min(BACKOFF_MOST, BACKOFF_FIRST * 2**tries)))

    async def _connection(self) -> None:
        line = await Line.open(self._dice.choice(self._crowd.spec.ports), self._crowd.spec.source)
        line.silence = self._crowd.spec.silence
        try:
            with trio.move_on_after(self._dice.uniform(*RESTLESS)) as stay, self._asked_anew():
                if not self._restless:
                    stay.deadline = float("inf")
                async with trio.open_nursery() as nursery:
                    await self._greet(line)
                    if self._sends:
                        nursery.start_soon(self._send_for_ever, line)
                    await self._listen(line, nursery)
        finally:
            line.close()

    @contextmanager
    def _asked_anew(self) -> Iterator[None]:
        """What a former connection waited for, this one does not."""
        self._waiting.clear()
        self._asking.clear()
        yield

    async def _greet(self, line: Line) -> None:
        with _patience(HELLO_SECONDS):
            await line.receive()  # hello, which is all there can be
        self.records.append(Connected(monotonic()))
        await self._ask(line)

    async def _ask(self, line: Line) -> None:
        self._asking = {room: self.cursors.get(room) for room in self.rooms}
        rooms = {str(room): self._since(room, after) for room, after in self._asking.items()}
        await line.send("auth", ref=0, token=self.token(), rooms=rooms, epoch=self._epoch)

    def _since(self, room: int, after: int | None) -> object:
        return {"after": after, "mark": self.marks.get(room)} if self._sends_marks else after

    async def _listen(self, line: Line, nursery: trio.Nursery) -> None:
        while True:
            frames = await line.receive()
            now = monotonic()
            for frame in frames:
                if (answer := self._take(frame, now)) is not None:
                    # Never from here: a server that does not read would keep us from hearing it.
                    nursery.start_soon(answer, line)

    def _take(self, frame: Frame, now: float) -> Callable[[Line], Awaitable[None]] | None:
        """Synchronous: the cursor is moved before anything else happens. Returns what is to be sent."""
        if frame.event.startswith("message"):
            return self._hear(frame, now)
        if frame.event == "ready":
            self._epoch = frame.epoch
            for answer in frame.rooms.values():
                self._answered(answer, now, asked=True)
        elif frame.event == "subscribed":
            self._answered(frame, now, asked=frame.ref is not None)
        elif frame.event == "unsubscribed":
            return self._refused(frame.conversation_id, frame.code, now)
        elif frame.event == "ping":
            return partial(_send, "pong")
        elif frame.ref is not None and frame.ref in self._waiting:
            self._waiting.pop(frame.ref)(frame)
        elif frame.event == "error" and frame.ref is not None and frame.ref < 0:  # a `subscribe` of ours
            return self._refused(-frame.ref, frame.code, now)
        return None

    def _hear(self, frame: Frame, now: float) -> Callable[[Line], Awaitable[None]] | None:
        room = frame.conversation_id
        self.records.append(Heard(now, room, self._crowd.seen(room, frame)))
        cursor = self.cursors.get(room, 0)
        if frame.seq == cursor + 1:
            self.cursors[room], self.marks[room] = frame.seq, frame.mark
        elif frame.seq > cursor + 1 and room not in self._asking:
            return partial(self._subscribe, room)
        return None

    def _answered(self, answer: RoomAnswer | Frame, now: float, *, asked: bool) -> None:
        room = answer.conversation_id
        after = self._asking.pop(room, None) if asked else self.cursors.get(room)
        changes = [self._crowd.seen(room, change) for change in answer.changes]
        self.records.append(
            Answered(now, room, after, answer.recovered, answer.seq, changes, asked, answer.mark)
        )
        self.cursors[room], self.marks[room] = answer.seq, answer.mark

    def _refused(self, room: int, code: str, now: float) -> Callable[[Line], Awaitable[None]]:
        self._asking.pop(room, None)
        if code != "unavailable":  # then it is as if nothing had been asked
            self.records.append(Unsubscribed(now, room, code))
            self.cursors.pop(room, None)
            self.marks.pop(room, None)
        return partial(self._subscribe_again, room)

    async def _subscribe_again(self, room: int, line: Line) -> None:
        await trio.sleep(ASK_AGAIN)
        await self._subscribe(room, line)

    async def _subscribe(self, room: int, line: Line) -> None:
        if room not in self._asking:
            after = self._asking[room] = self.cursors.get(room)
            since = {"after": after} | ({"mark": self.marks.get(room)} if self._sends_marks else {})
            await line.send("subscribe", ref=-room, conversation_id=room, epoch=self._epoch, **since)

    # Sending.

    async def _send_for_ever(self, line: Line) -> None:
        while True:
            await self._crowd.sending.wait()
            if self._unanswered is None:
                self._unanswered = f"ws {self.user} {next(self._bodies)}"
            if await self._send_one(line, self._unanswered) is not Outcome.INFO:
                self._unanswered = None  # else it is tried again, with the same client_id
            await trio.sleep(self._dice.uniform(*SEND_EVERY))

    async def _send_one(self, line: Line, body: str) -> Outcome:
        ref, room = next(self._refs), self.rooms[0]
        replied = trio.Event()
        reply = Frame("error", code="no answer", retryable=True)

        def take(frame: Frame) -> None:
            nonlocal reply
            reply = frame
            replied.set()

        self._waiting[ref] = take
        invoked = monotonic()
        try:
            await line.send("send", ref=ref, conversation_id=room, content=body, client_id=body)
            with trio.move_on_after(REPLY_SECONDS):
                await replied.wait()
        finally:
            outcome = _outcome(reply)
            self._crowd.attempts.append(
                Attempt(
                    Kind.POST, room, self.user, body, invoked, monotonic(), outcome,
                    reply.id, reply.seq, reply.duplicate, reply.code,
                )
            )  # fmt: skip
        return outcome


class Outsider(Member):
    """Has a good token, which opens nothing; asks for the rooms all the same."""

    outsider = True

    def token(self) -> str:
        return self._crowd.tokens.issue(self.user, TOKEN_SECONDS, [])


def _outcome(reply: Frame) -> Outcome:
    if reply.event == "ok":
        return Outcome.OK
    # Its room was taken from it for a while: it has not happened, and the next one is another message.
    return Outcome.INFO if reply.retryable else Outcome.FAIL


async def _send(event: str, line: Line) -> None:
    await line.send(event)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Raises Closed when it is over: the peer is gone, and did not say so."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Closed(0)


def _closed_with(group: BaseExceptionGroup[Closed]) -> int:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error.code if isinstance(error, Closed) else 0
