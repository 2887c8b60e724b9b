"""The clients of a run, a process of their own: they listen, come and go, and remember what they were given.

`python -m tests.faults.crowd` takes a `Spec` and then commands as lines of JSON on stdin, and answers each
with a line on stdout. A client does what the protocol asks of one, but for shorter waits between two tries.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import IO

import msgspec
import trio
from msgspec import Struct

from chatd.auth.tokens import Tokens
from tests.faults import history
from tests.faults.history import PADDING, Attempt, Seen
from tests.faults.line import Change, Frame
from tests.faults.member import Member, Outsider, Spec


class Do(Struct):
    """`load` and `quiet` start and end the sending, `report` asks for the cursors, `stop` ends with a file."""

    what: str
    path: str = ""


class Held(Struct, frozen=True):
    """What a client has of a room: its cursor, -1 where it is not in it, and the mark of that change."""

    cursor: int
    mark: str | None


class Report(Struct):
    """By conversation: what clients have that want to be in it, each once, and somebody who has just that."""

    held: dict[int, list[tuple[Held, str]]]


class Result(Struct):
    clients: list[history.Client]
    attempts: list[Attempt]


class Crowd:
    """What all clients of the process share."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.tokens = Tokens(spec.secret)
        self.attempts: list[Attempt] = []
        self.sending = trio.Event()
        self._seen: dict[tuple[object, ...], Seen] = {}
        self.members = [
            Member(self, room * 1000 + number, [room], restless=number % 10 == 0, sends=number == 1)
            for room in range(1, spec.rooms + 1)
            for number in spec.numbers
        ]
        everywhere = list(range(1, spec.rooms + 1))
        number = itertools.count(spec.others)
        self.members += [Member(self, next(number), everywhere) for _ in range(spec.wanderers)]
        self.outsiders = [Outsider(self, next(number), everywhere) for _ in range(spec.outsiders)]

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for one in [*self.members, *self.outsiders]:
                nursery.start_soon(one.run)

    def load(self) -> None:
        self.sending.set()

    def quiet(self) -> None:
        self.sending = trio.Event()

    def seen(self, room: int, change: Change | Frame) -> Seen:
        """The same object for all who were given the same."""
        body = change.content and change.content.rstrip(PADDING)
        seen = Seen(change.seq, change.id, change.event, body, change.client_id, change.mark)
        key = (room, seen.seq, seen.id, seen.event, seen.body, seen.client_id, seen.mark)
        return self._seen.setdefault(key, seen)

    def report(self) -> Report:
        held: dict[int, dict[Held, str]] = {}
        for member in self.members:
            for room in member.rooms:
                mine = Held(member.cursors.get(room, -1), member.marks.get(room))
                held.setdefault(room, {}).setdefault(mine, member.state)
        return Report({room: list(found.items()) for room, found in held.items()})

    def result(self) -> Result:
        return Result([one.client() for one in [*self.members, *self.outsiders]], self.attempts)


# The process.


async def serve(commands: IO[bytes], answers: IO[bytes]) -> None:
    def answer(what: object) -> None:
        answers.write(msgspec.json.encode(what) + b"\n")
        answers.flush()

    crowd = Crowd(msgspec.json.decode(commands.readline(), type=Spec))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crowd.run)
        answer("ready")
        while line := await trio.to_thread.run_sync(commands.readline, abandon_on_cancel=True):
            command = msgspec.json.decode(line, type=Do)
            match command.what:
                case "load":
                    crowd.load()
                case "quiet":
                    crowd.quiet()
                case "report":
                    answer(crowd.report())
                    continue
                case "stop":
                    _save(Path(command.path), crowd.result())
            answer("done")
        nursery.cancel_scope.cancel()


def _save(path: Path, result: Result) -> None:
    path.write_bytes(msgspec.msgpack.encode(result))


if __name__ == "__main__":
    trio.run(serve, sys.stdin.buffer, sys.stdout.buffer)
