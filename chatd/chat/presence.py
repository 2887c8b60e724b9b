"""Presence: the users and rooms with connections, on this node and on the others. It is soft state: each node
repeats its own part, and the others forget that part when the node is gone.

An id is present in a *scope*, perhaps on several nodes:

    USERS              user ids: the user has a connection
    ROOMS              conversation ids: the room has a subscriber
    a conversation     user ids: a subscriber who is no member (by token, or because all rooms are open)

Each node sends the others its changes at once, a heartbeat every 2 s, and its whole state every 10 s. The
versions of an id grow, so an old "gone" that arrives after a newer "present" has no effect. A node is forgotten
when it is silent *and* its lease in the database is over. So nobody goes offline while only Redis is down.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import trio
from msgspec import Struct

from chatd.chat.leases import Life
from chatd.core.model import Present, Signal

USERS, ROOMS = 0, -1

SEND_ALL = 10.0  # seconds between two signals with a node's whole state
HEARTBEAT = 2.0  # seconds between heartbeats
SILENT = 8.0  # seconds of silence after which a node is gone, if its lease is over
FORGET = 25.0  # seconds of silence after which a node that never had a lease is gone
GATHER = 0.05  # seconds that changes wait for further ones, before they are sent to the other nodes
PART = 1000  # entries in one signal, about 30 KB
SLICE = 200  # entries handled between two checkpoints: each may cause events for many rooms
HEARD = 1000  # waiting signals of other nodes; more drop the oldest, which the next whole state makes up for
REMEMBER = 60_000  # ms to keep the version of an id that is gone; a repeated signal never comes later than this

Key = tuple[int, int]  # (scope, id)


class Transition(Struct, frozen=True):
    """An id has become present or absent, counting all nodes together."""

    scope: int
    id: int
    present: bool
    version: int


class _Entry(Struct):
    """The number of a node's connections for a key (0: gone), the version of that number, and the last `round`
    of whole state that named the key.
    """

    connections: int
    version: int
    round: int = 0


class _Node(Struct):
    """Another node. `parts`: how many parts have arrived of its whole state number `round`."""

    heard_at: float
    entries: dict[Key, _Entry]
    round: int = 0
    parts: int = 0


def _unknown(node: str) -> Life:
    return Life.UNKNOWN


class Presence:
    def __init__(
        self,
        node: str,
        tell: Callable[[Signal], None] | None,
        life: Callable[[str], Life] = _unknown,
    ) -> None:
        """`tell` sends a signal to the other nodes; None: there are no others.

        `life` returns the state of another node's lease.
        """
        self.node, self.life, self._tell = node, life, tell
        self._own: dict[Key, _Entry] = {}
        self._nodes: dict[str, _Node] = {}
        self._present: dict[int, dict[int, int]] = {}  # scope → id → number of nodes that have it
        self._versions: dict[Key, int] = {}
        self._unsent: dict[Key, None] = {}
        self._heard: deque[Present] = deque(maxlen=HEARD)
        self._gone: deque[tuple[_Node, list[Key]]] = deque()
        self._wake, self._work = trio.Event(), trio.Event()
        self._round = 0
        self._sent_all_at = -SEND_ALL
        self._on_change: list[Callable[[Transition], None]] = []
        self._on_own_change: list[Callable[[Key], None]] = []

    def on_change(self, call: Callable[[Transition], None]) -> None:
        """Register a callback for each transition, counting all nodes together."""
        self._on_change.append(call)

    def on_own_change(self, call: Callable[[Key], None]) -> None:
        """Register a callback for each key for which this node gets its first or loses its last connection."""
        self._on_own_change.append(call)

    # Queries.

    def has(self, scope: int, id: int) -> bool:
        return id in self._present.get(scope, ())

    def present(self, scope: int) -> Set[int]:
        return self._present.get(scope, {}).keys()

    def who(self, conversation_id: int, members: Iterable[int]) -> set[int]:
        """The users online in a room: members with a connection, and subscribers who are not members."""
        return set(members) & self.present(USERS) | self.present(conversation_id)

    def connections(self, user_id: int) -> int:
        """The number of a user's connections on all nodes."""
        key = (USERS, user_id)
        entries = [self._own.get(key), *(node.entries.get(key) for node in self._nodes.values())]
        return sum(entry.connections for entry in entries if entry is not None)

    def version(self, scope: int, id: int) -> int:
        return self._versions.get((scope, id), 0)

    @property
    def alone(self) -> bool:
        """Whether there are no other nodes."""
        return self._tell is None

    def has_own(self, key: Key) -> bool:
        return key in self._own

    def own_keys(self) -> list[Key]:
        return list(self._own)

    # Changes on this node. These functions are synchronous.

    def arrive(self, scope: int, id: int) -> None:
        key = (scope, id)
        if entry := self._own.get(key):
            entry.connections += 1
            entry.version = self._next_version(key)
        else:
            self._own[key] = _Entry(1, self._next_version(key))
            self._count(key, 1, self._own[key].version, own=True)
            self._owned(key)
        self._send_soon(key)

    def leave(self, scope: int, id: int) -> None:
        key = (scope, id)
        entry = self._own[key]
        entry.connections -= 1
        entry.version = self._next_version(key)
        if not entry.connections:
            del self._own[key]
            self._count(key, -1, entry.version, own=True)
            self._owned(key)
        self._send_soon(key)

    def _owned(self, key: Key) -> None:
        for call in self._on_own_change:
            call(key)

    def _next_version(self, key: Key) -> int:
        version = self._versions[key] = max(self._versions.get(key, 0) + 1, _milliseconds())
        return version

    def _count(self, key: Key, by: int, version: int, *, own: bool = False) -> None:
        """Count one node more or less for a key.

        Versions of this node's `own` changes are the highest already.
        """
        scope, id = key
        here = self._present.setdefault(scope, {})
        before = here.get(id, 0)
        if before + by:
            here[id] = before + by
        else:
            del here[id]
            if not here:
                del self._present[scope]
        if bool(before) != bool(before + by):
            if not own:
                version = self._versions[key] = max(version, self._versions.get(key, 0) + 1)
            for call in self._on_change:
                call(Transition(scope, id, bool(before + by), version))

    # Other nodes.

    def hear(self, signal: Present) -> None:
        if signal.node == self.node:
            return
        self._heard.append(signal)
        self._work.set()

    async def _take_heard(self) -> None:
        """Handle signals and forgotten nodes in slices, so that a burst does not block the event loop."""
        while True:
            if not self._heard and not self._gone:
                self._work = trio.Event()
                await self._work.wait()
            while self._gone:
                await self._drop(*self._gone.popleft())
            if self._heard:
                await self._take(self._heard.popleft())

    async def _take(self, signal: Present) -> None:
        node = self._nodes.get(signal.node)
        if node is None:
            node = self._nodes[signal.node] = _Node(0.0, {})
        node.heard_at = trio.current_time()
        round, part, parts = signal.whole or (node.round, 0, 0)
        if round != node.round:
            node.round, node.parts = round, 0
        for count, (scope, id, connections, version) in enumerate(signal.entries, 1):
            self._apply(node, (scope, id), connections, version)
            if count % SLICE == 0:
                await trio.lowlevel.checkpoint()
        if signal.whole:
            node.parts += 1
            if part == parts - 1 == node.parts - 1:  # no part was lost, so keys that they do not name are gone
                await self._drop(node, [key for key, entry in node.entries.items() if entry.round != round])

    def _apply(self, node: _Node, key: Key, connections: int, version: int) -> None:
        entry = node.entries.get(key)
        if entry is None:
            entry = node.entries[key] = _Entry(0, 0)
        entry.round = node.round
        if version < entry.version:
            return
        before, entry.connections, entry.version = entry.connections, connections, version
        if bool(before) != bool(connections):
            self._count(key, 1 if connections else -1, version)

    async def _drop(self, node: _Node, keys: Sequence[Key]) -> None:
        for count, key in enumerate(keys, 1):
            entry = node.entries.pop(key, None)  # None: `_forget_versions` removed it during a checkpoint
            if entry is not None and entry.connections:
                self._count(key, -1, self._versions.get(key, 0) + 1)
            if count % SLICE == 0:
                await trio.lowlevel.checkpoint()

    def _forget_silent(self) -> None:
        now = trio.current_time()
        for name, node in list(self._nodes.items()):
            silence, life = now - node.heard_at, self.life(name)
            if (life is Life.OVER and silence > SILENT) or (life is Life.UNKNOWN and silence > FORGET):
                del self._nodes[name]
                self._gone.append((node, list(node.entries)))
                self._work.set()

    # Sending to other nodes.

    def tell_all_soon(self) -> None:
        """Send the whole state soon, because the other nodes may have missed signals."""
        self._sent_all_at = -SEND_ALL
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_heard)
            task_status.started()
            while True:
                if trio.current_time() - self._sent_all_at >= SEND_ALL:
                    self._sent_all_at = trio.current_time()
                    await self._send_all()
                    await self._forget_versions()
                else:
                    await self._send_changed()
                self._forget_silent()
                with trio.move_on_after(HEARTBEAT):
                    await self._wake.wait()
                    await trio.sleep(GATHER)
                self._wake = trio.Event()

    def _send_soon(self, key: Key) -> None:
        if self._tell is not None:
            self._unsent[key] = None
            self._wake.set()

    async def _send_changed(self) -> None:
        """Send the changes, or a heartbeat if there are none."""
        if self._tell is None:
            return
        unsent, self._unsent = list(self._unsent), {}
        for part in list(_parts(unsent)) or [[]]:
            self._send([self._entry_of(key) for key in part], None)
            await trio.lowlevel.checkpoint()

    async def _send_all(self) -> None:
        if self._tell is None:
            return
        self._round += 1
        parts = list(_parts(list(self._own))) or [[]]
        for number, part in enumerate(parts):
            self._send([self._entry_of(key) for key in part], (self._round, number, len(parts)))
            await trio.lowlevel.checkpoint()

    def _entry_of(self, key: Key) -> tuple[int, int, int, int]:
        entry = self._own.get(key)
        return (*key, entry.connections if entry else 0, entry.version if entry else self._versions.get(key, 0))

    def _send(self, entries: list[tuple[int, int, int, int]], whole: tuple[int, int, int] | None) -> None:
        assert self._tell is not None
        self._tell(Present(self.node, entries, whole))

    async def _forget_versions(self) -> None:
        old = _milliseconds() - REMEMBER
        for count, (key, version) in enumerate(list(self._versions.items()), 1):
            if (
                version < old
                and key not in self._unsent
                and not self.has(*key)
                and self._versions[key] == version
            ):
                del self._versions[key]
            if count % PART == 0:
                await trio.lowlevel.checkpoint()
        for node in list(self._nodes.values()):
            for count, (key, entry) in enumerate(list(node.entries.items()), 1):
                if not entry.connections and entry.version < old:
                    node.entries.pop(key, None)
                if count % PART == 0:
                    await trio.lowlevel.checkpoint()


def _parts(keys: list[Key]) -> Iterator[list[Key]]:
    for start in range(0, len(keys), PART):
        yield keys[start : start + PART]


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
