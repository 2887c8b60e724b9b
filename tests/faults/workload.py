"""The backend of a run: posters that retry with the same key, and one who removes members and adds them back.

They are in the runner's process. What they did is in `attempts`, with the outcome as they saw it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import msgspec
import trio

from tests.faults.history import PADDING, Attempt, Kind, Outcome

TOKEN = "a-token-for-faults"
PATIENCE = 5.0  # seconds for an answer; then it is unknown, and the same is asked again
AGAIN = (0.02, 0.2)  # seconds until it is
THINK = (0.0, 0.05)  # seconds between two operations of a poster
LOOK = 0.02  # seconds between two looks at something that ends by itself
STEP = 0.05  # seconds between two batches of the torrent
REMEMBERED = 50  # own messages that a poster may edit or delete
EDIT_SHARE, DELETE_SHARE = 1 / 15, 1 / 40
AWAY = (
    1.5,
    3.0,
)  # seconds that a removed member stays away, longer than what a removal is given to take effect
# Numbers of a room's members that are removed and added back. The first one sends, the tenth ones are restless.
FLAPPED = (2, 3, 4)


class Backend:
    """A connection to the API that is made anew when it breaks. Raises OSError or TooSlowError."""

    def __init__(self, token: str = TOKEN) -> None:
        self._token = token
        self._stream: trio.SocketStream | None = None
        self.port = 0  # where it is connected

    async def request(self, port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = msgspec.json.encode(body) if body is not None else b""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Internal-Token: {self._token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            with trio.fail_after(PATIENCE):
                if self._stream is None or port != self.port:
                    self.close()
                    self._stream, self.port = await trio.open_tcp_stream("127.0.0.1", port), port
                await self._stream.send_all(head.encode() + data)
                return await self._answer(self._stream)
        except BaseException:
            self.close()
            raise

    async def text(self, port: int, path: str) -> str:
        """The body of a page that is no JSON."""
        return str((await self.request(port, "GET", path))[1])

    @staticmethod
    async def _answer(stream: trio.SocketStream) -> tuple[int, Any]:
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += await _some(stream)
        head, got = got[:end].decode().lower(), got[end + 4 :]
        size = int(head.partition("content-length:")[2].partition("\r\n")[0])
        while len(got) < size:
            got += await _some(stream)
        return int(head.split()[1]), msgspec.json.decode(got) if "json" in head else got.decode()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.socket.close()
        self._stream, self.port = None, 0


async def _some(stream: trio.SocketStream) -> bytes:
    if data := await stream.receive_some():
        return data
    raise ConnectionResetError("the server has hung up")


class Workload:
    """`start` the load, `stop` it: all that was begun is brought to an end, or given up as unknown."""

    def __init__(self, ports: Sequence[int], rooms: int, posters: int, seed: int, rate: int = 0) -> None:
        """`rate`: so many messages a second in batches, on top of what the posters post one by one."""
        self.attempts: list[Attempt] = []
        self._ports, self._rooms = ports, rooms
        self._dice = random.Random(seed)
        self._names = itertools.count(1)
        self._posters = [
            Poster(self, 800_001 + number, random.Random(seed + number)) for number in range(posters)
        ]
        self._torrent = Torrent(self, 810_001, rate) if rate else None
        self._filler = Torrent(self, 820_001, 0)
        self._quiet = trio.Event()
        self._doubtful: set[tuple[int, int]] = set()  # (room, number) of removals that may happen yet
        self.only_posts = False
        self.changing = 0  # edits and deletions that wait for their answer

    async def run(self, seconds_to_finish: float, *, task_status: trio.TaskStatus[None]) -> None:
        """One phase of load, until `stop`; what is unanswered so many seconds later stays unknown."""
        self._quiet = trio.Event()
        task_status.started()
        async with trio.open_nursery() as nursery:
            for poster in self._posters:
                nursery.start_soon(poster.run)
            for number in FLAPPED:
                nursery.start_soon(self._flap, number)
            if self._torrent is not None:
                nursery.start_soon(self._torrent.run)
            await self._quiet.wait()
            nursery.cancel_scope.deadline = trio.current_time() + seconds_to_finish
        with trio.move_on_after(seconds_to_finish):
            await self._bring_back()

    def stop(self) -> None:
        self._quiet.set()

    @property
    def quiet(self) -> bool:
        return self._quiet.is_set()

    @asynccontextmanager
    async def going_back(self) -> AsyncIterator[None]:
        """The database goes back in time in here, and the backend knows that it does.

        Nobody edits, for an id may be given to another message then; what was posted before is forgotten, and
        the members are put right.
        """
        self.only_posts = True
        while self.changing:
            await trio.sleep(LOOK)
        try:
            yield
        finally:
            for poster in self._posters:
                poster.forget()
            self._doubtful |= {(room, number) for room in range(1, self._rooms + 1) for number in FLAPPED}
            self.only_posts = False

    async def fill(self, messages: int, size: int) -> None:
        """Post so many messages of so many characters to each room, and see them acknowledged."""
        async with trio.open_nursery() as nursery:
            for room in range(1, self._rooms + 1):
                nursery.start_soon(self._filler.fill, room, messages, size)

    async def _flap(self, number: int) -> None:
        """Remove a member and add it back, another one each time; never leave one outside."""
        backend = Backend()
        while not self.quiet:
            room = self._dice.randint(1, self._rooms)
            await self._change_member(backend, Kind.REMOVE, room, number)
            await trio.sleep(self._dice.uniform(*AWAY))
            await self._change_member(backend, Kind.ADD, room, number)

    async def _bring_back(self) -> None:
        """A removal that was not answered may have waited in a frozen daemon, and come after the return."""
        backend = Backend()
        for room, number in sorted(self._doubtful):
            await self._change_member(backend, Kind.ADD, room, number)
        self._doubtful.clear()

    async def _change_member(self, backend: Backend, kind: Kind, room: int, number: int) -> None:
        user = room * 1000 + number
        method = "PUT" if kind is Kind.ADD else "DELETE"
        path = f"/api/ws/conversations/{room}/members/{user}"
        name = f"{kind} {next(self._names)}"
        while True:
            attempt = await self.attempt(
                backend, Attempt(kind, room, user, name, 0, 0, Outcome.INFO), method, path
            )
            if attempt.outcome is not Outcome.INFO:
                return
            if kind is Kind.REMOVE:
                self._doubtful.add((room, number))
            await trio.sleep(self._dice.uniform(*AGAIN))

    def port(self, backend: Backend) -> int:
        return backend.port or self._dice.choice(self._ports)

    async def attempt(
        self, backend: Backend, attempt: Attempt, method: str, path: str, body: Any = None
    ) -> Attempt:
        """Ask the node that answered last, or after a failure one at random; record what became of it."""
        attempt.invoked = monotonic()
        port = self.port(backend)
        try:
            status, data = await backend.request(port, method, path, body)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            attempt.code = type(error).__name__
        else:
            attempt.outcome = _outcome(status)
            attempt.id = data.get("id", attempt.id)
            attempt.seq, attempt.duplicate = data.get("seq", 0), data.get("duplicate", False)
            attempt.code = data.get("code", "")
        finally:
            attempt.ended = monotonic()
            self.attempts.append(attempt)
        return attempt


class Poster:
    """Posts to all rooms; now and then it edits or deletes what it has posted."""

    def __init__(self, workload: Workload, user: int, dice: random.Random) -> None:
        self._workload, self._user, self._dice = workload, user, dice
        self._numbers = itertools.count(1)
        self._own: deque[Attempt] = deque(maxlen=REMEMBERED)
        self._backend = Backend()

    async def run(self) -> None:
        while not self._workload.quiet:
            luck = 1.0 if self._workload.only_posts else self._dice.random()
            if self._own and luck < EDIT_SHARE:
                await self._edit(self._dice.choice(self._own))
            elif self._own and luck < EDIT_SHARE + DELETE_SHARE:
                await self._delete(self._own.popleft())
            else:
                await self._post()
            await trio.sleep(self._dice.uniform(*THINK))

    def forget(self) -> None:
        """What it has posted may be gone, and its ids another's."""
        self._own.clear()

    async def _post(self) -> None:
        room = self._dice.randint(1, self._workload._rooms)
        text = f"http {self._user} {next(self._numbers)}"
        body = {"conversation_id": room, "sender_id": self._user, "content": text, "client_id": text}
        while True:
            attempt = Attempt(Kind.POST, room, self._user, text, 0, 0, Outcome.INFO)
            await self._workload.attempt(self._backend, attempt, "POST", "/api/ws/messages", body)
            if attempt.outcome is Outcome.OK:
                self._own.append(attempt)
            if attempt.outcome is not Outcome.INFO:
                return
            await trio.sleep(self._dice.uniform(*AGAIN))

    async def _edit(self, own: Attempt) -> None:
        text = f"{own.body} edited {next(self._numbers)}"
        attempt = self._aimed(Kind.EDIT, own, text)
        await self._change(attempt, "PATCH", {"content": text})

    async def _delete(self, own: Attempt) -> None:
        name = f"{own.body} deleted"
        attempt = self._aimed(Kind.DELETE, own, name)
        await self._change(attempt, "DELETE")

    async def _change(self, attempt: Attempt, method: str, body: Any = None) -> None:
        self._workload.changing += 1
        try:
            await self._workload.attempt(self._backend, attempt, method, f"/api/ws/messages/{attempt.id}", body)
        finally:
            self._workload.changing -= 1

    def _aimed(self, kind: Kind, own: Attempt, name: str) -> Attempt:
        return Attempt(kind, own.conversation, self._user, name, 0, 0, Outcome.INFO, own.id, of=own.body)


class Torrent:
    """Posts batches: at a fixed rate, each message to a room at random, or many to one room. What is unknown is
    posted again.
    """

    def __init__(self, workload: Workload, user: int, rate: int) -> None:
        self._workload, self._user = workload, user
        self._size = round(rate * STEP)
        self._numbers = itertools.count(1)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            due = trio.current_time()
            while not self._workload.quiet:
                nursery.start_soon(self._post, self._batch())
                due = max(due + STEP, trio.current_time() - 1)  # after an outage it does not make up for it
                await trio.sleep_until(due)

    async def fill(self, room: int, messages: int, size: int) -> None:
        await self._post([self._message(room, size) for _ in range(messages)])

    def _batch(self) -> list[dict[str, Any]]:
        dice, rooms = self._workload._dice, self._workload._rooms
        return [self._message(dice.randint(1, rooms)) for _ in range(self._size)]

    def _message(self, room: int, size: int = 0) -> dict[str, Any]:
        text = f"batch {self._user} {next(self._numbers)}"
        content = text.ljust(size, PADDING)
        return {"conversation_id": room, "sender_id": self._user, "content": content, "client_id": text}

    async def _post(self, batch: list[dict[str, Any]]) -> None:
        backend = Backend()
        while batch:
            invoked = monotonic()
            try:
                port = self._workload.port(backend)
                status, data = await backend.request(
                    port, "POST", "/api/ws/messages/batch", {"messages": batch}
                )
                results = data["results"] if status == 200 else [{"code": data["code"]}] * len(batch)
            except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                results = [{"code": type(error).__name__}] * len(batch)
            made = [self._attempt(one, result, invoked) for one, result in zip(batch, results, strict=True)]
            self._workload.attempts += made
            batch = [one for one, attempt in zip(batch, made, strict=True) if attempt.outcome is Outcome.INFO]
            if batch:
                await trio.sleep(self._workload._dice.uniform(*AGAIN))
        backend.close()

    @staticmethod
    def _attempt(one: dict[str, Any], result: dict[str, Any], invoked: float) -> Attempt:
        outcome = Outcome.OK if "id" in result else Outcome.INFO
        place, text = one["conversation_id"], one["client_id"]
        attempt = Attempt(Kind.POST, place, one["sender_id"], text, invoked, monotonic(), outcome)
        attempt.id, attempt.seq = result.get("id", 0), result.get("seq", 0)
        attempt.duplicate, attempt.code = result.get("duplicate", False), result.get("code", "")
        return attempt


def _outcome(status: int) -> Outcome:
    if status == 200:
        return Outcome.OK
    # 503 and 500 say that the outcome is not known, 429 that it has not happened but may, if asked for again.
    return Outcome.INFO if status >= 500 or status == 429 else Outcome.FAIL
