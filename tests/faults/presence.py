"""Who is online: what the backend was told, what clients see, and who is connected in truth.

Some clients in the runner's process come and go all the time; half of them watch. When a fault is over half of
them stay and the others are gone, by turns; every third of these went with its connection, and has not come
back. Then every picture must come true within `WITHIN` seconds, and is recorded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import monotonic

import msgspec
import trio
from msgspec import Struct

from chatd.auth.tokens import Tokens
from tests.backend import Backend as Told
from tests.faults.history import Picture
from tests.faults.line import Closed, Line
from tests.faults.workload import Backend

WITHIN = 15.0  # seconds after a fault that pictures have to come true (G9)
USERS = range(990_001, 990_013)
SQUARE, CORNER = 99_001, 99_002  # rooms: one for all, one for those who leave and come back together
STAY, AWAY = (0.5, 8.0), (0.2, 6.0)  # seconds, while there is load
AGAIN = (0.1, 0.5)  # seconds until the next try where nobody listens
TOKEN_SECONDS = 7 * 24 * 3600
FIRST, LAST = 5.0, 0.05  # seconds for hello and ready; between two looks
EVENTS = ["user.online", "user.offline", "room.occupied", "room.vacated"]
SECRET = "what signs the webhooks of a run."


class Frame(Struct):
    event: str
    conversation_id: int = 0
    user_id: int = 0
    online: bool | list[int] = []
    version: int = 0


_decode = msgspec.json.Decoder(Frame).decode


class Attendee:
    """`picture` is what it sees of the square; None while it cannot see anything."""

    def __init__(self, around: Presence, user: int) -> None:
        self._around, self.user = around, user
        self.stays, self.watches, self._settled = user % 2 == 0, user % 4 < 2, user % 3 == 0
        self.rooms = [SQUARE, CORNER] if self.stays else [SQUARE]
        self._dice = random.Random(user)
        self.connected = False
        self.picture: set[int] | None = None
        self._versions: dict[int, int] = {}
        self._visit = trio.CancelScope()

    @property
    def name(self) -> str:
        return f"attendee {self.user}"

    def settle(self) -> None:
        """The load is over."""
        if self.stays:
            self._visit.deadline = float("inf")
        else:
            self._visit.cancel()

    async def run(self) -> None:
        while True:
            if not self.stays:
                await self._around.loaded.wait()
            with trio.CancelScope() as self._visit:
                if self._around.loaded.is_set() and (self.stays or not self._settled):
                    self._visit.deadline = trio.current_time() + self._dice.uniform(*STAY)
                try:
                    await self._connection()
                except (Closed, OSError, trio.TooSlowError):
                    if self._settled and not self.stays:
                        await trio.sleep_forever()  # until the load is over
                    await trio.sleep(self._dice.uniform(*AGAIN))
            if self._visit.cancelled_caught and self._around.loaded.is_set():
                await trio.sleep(self._dice.uniform(*AWAY))

    async def _connection(self) -> None:
        line = await Line.open(self._dice.choice(self._around.ports), "127.0.0.1")
        try:
            with trio.fail_after(FIRST):
                await line.receive()  # hello
                token = self._around.tokens.issue(self.user, TOKEN_SECONDS, self.rooms)
                await line.send("auth", ref=0, token=token, rooms={})
                while not any(_decode(text).event == "ready" for text in await line.texts()):
                    pass
            self.connected = True
            line.silence = self._around.silence
            for room in self.rooms:
                watching = self.watches and room == SQUARE
                await line.send("subscribe", ref=room, conversation_id=room, presence=watching)
            while True:
                for text in await line.texts():
                    await self._take(_decode(text), line)
        finally:
            self.connected, self.picture = False, None
            self._versions.clear()
            line.close()

    async def _take(self, frame: Frame, line: Line) -> None:
        if frame.event == "ping":
            await line.send("pong")
        elif frame.event == "subscribed" and isinstance(frame.online, list):
            if self.watches and frame.conversation_id == SQUARE:
                self.picture = set(frame.online)
        elif frame.event == "presence" and frame.version >= self._versions.get(frame.user_id, 0):
            self._versions[frame.user_id] = frame.version
            if self.picture is not None:
                (self.picture.add if frame.online else self.picture.discard)(frame.user_id)


class Presence:
    """`settle` the clients when a fault is over; `pictures` are what they and the backend saw then."""

    def __init__(
        self, told: Told, ports: Sequence[int], api_ports: Sequence[int], secret: str, silence: float
    ) -> None:
        self._told, self.ports, self._api_ports = told, ports, api_ports
        self.tokens, self.silence = Tokens(secret), silence
        self.loaded = trio.Event()
        self.pictures: list[Picture] = []
        self._attendees = [Attendee(self, user) for user in USERS]

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        backend = Backend()
        for user in USERS:
            path = f"/api/ws/conversations/{SQUARE}/members/{user}"
            await backend.request(self._api_ports[0], "PUT", path, {})
        backend.close()
        async with trio.open_nursery() as nursery:
            for one in self._attendees:
                nursery.start_soon(one.run)
            task_status.started()

    def load(self) -> None:
        """Who stayed after the last fault leaves after this one: no picture is true by standing still."""
        for one in self._attendees:
            one.stays = not one.stays
        self.loaded.set()

    async def settle(self, *, backend: bool) -> float:
        """Seconds that the last picture took; `WITHIN` where one did not come true.

        Without `backend` its picture is left out: no chatd knows what it heard before the database went back.
        """
        self.loaded = trio.Event()
        for one in self._attendees:
            one.settle()
        with trio.move_on_after(WITHIN):  # the clients' own time to be back is not chatd's
            while any(one.connected is not one.stays for one in self._attendees):
                await trio.sleep(LAST)
        began = monotonic()
        while any(one.seen != one.true for one in self._look(backend)) and monotonic() - began < WITHIN:
            await trio.sleep(LAST)
        self.pictures += self._look(backend)
        return monotonic() - began

    def _look(self, backend: bool) -> list[Picture]:
        now, here = monotonic(), [one for one in self._attendees if one.connected]
        users = sorted(one.user for one in here)
        rooms = sorted({room for one in here for room in one.rooms})
        told = self._believed()
        found = [Picture(now, one.name, sorted(one.picture or ()), users) for one in here if one.watches]
        if backend:
            found.append(Picture(now, "the backend", sorted(told["user"] & set(USERS)), users))
            found.append(Picture(now, "the backend, of rooms,", sorted(told["room"] & {SQUARE, CORNER}), rooms))
        return found

    def _believed(self) -> dict[str, set[int]]:
        """By the highest version of each, as the documentation says."""
        latest: dict[tuple[str, int], tuple[int, bool]] = {}
        for asked in list(self._told.asked):
            event, data = asked.json["event"], asked.json["data"]
            kind, _, what = event.partition(".")
            key = kind, data.get("user_id", data.get("conversation_id"))
            latest[key] = max(latest.get(key, (0, False)), (data["version"], what in ("online", "occupied")))
        return {
            kind: {id for (of, id), (_, there) in latest.items() if of == kind and there}
            for kind in ("user", "room")
        }


def settings_of(told: Told) -> dict[str, object]:
    return {"webhooks__url": told.url, "webhooks__secret": SECRET, "webhooks__events": ",".join(EVENTS)}
