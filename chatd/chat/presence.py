"""Who is connected, on this node and on the others: soft state, told again and again, forgotten when silent.

Something is present in a *place*, and may be so on several nodes:

    USERS              user ids: who has a connection at all
    ROOMS              conversation ids: where somebody listens
    a conversation     user ids: who listens without being a member (by token, or in an open deployment)

Each node tells the others at once what has changed, and all it has every 10 s. A change bears a version, which
grows with each: whoever hears "gone" after a later "there" is not misled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import trio
from msgspec import Struct

from chatd.model import Present, Signal

USERS, ROOMS = 0, -1

TELL_ALL = 10.0  # seconds between the whole sets of a node
FORGET = 25.0  # seconds of silence after which a node is taken to be gone
GATHER = 0.05  # seconds that changes wait for others, before the other nodes are told
PART = 1000  # entries of one signal, some 30 KB
REMEMBER = 60_000  # ms that the version of what has gone is kept: signals come twice, but not so late

Key = tuple[int, int]  # place, id
Watcher = Callable[["Transition"], None]


class Transition(Struct, frozen=True):
    """Something is present now that was not, or the other way round. `ours`: this node is to tell the world."""

    place: int
    id: int
    present: bool
    version: int
    ours: bool


class _Entry(Struct):
    """How many connections a node has for a key, and the version of that. None: it has gone."""

    connections: int
    version: int
    round: int = 0


class _Node(Struct):
    """Another node. `parts` are those that have come of the whole set numbered `round`."""

    heard_at: float
    entries: dict[Key, _Entry]
    round: int = 0
    parts: int = 0


class Presence:
    def __init__(self, node: str, tell: Callable[[Signal], None] | None) -> None:
        """`tell` gives a signal to the other nodes; None where there are none."""
        self._node, self._tell = node, tell
        self._own: dict[Key, _Entry] = {}
        self._nodes: dict[str, _Node] = {}
        self._present: dict[int, dict[int, int]] = {}  # place → id → how many nodes have it
        self._versions: dict[Key, int] = {}
        self._untold: dict[Key, None] = {}
        self._wake = trio.Event()
        self._round = 0
        self.watchers: list[Watcher] = []

    # What is known.

    def has(self, place: int, id: int) -> bool:
        return id in self._present.get(place, ())

    def present(self, place: int) -> Set[int]:
        return self._present.get(place, {}).keys()

    def who(self, conversation_id: int, members: Iterable[int]) -> set[int]:
        """Who is online in a room: members with a connection, and who is in it without being one."""
        return set(members) & self.present(USERS) | self.present(conversation_id)

    def connections(self, user_id: int) -> int:
        """Of a user, on all nodes."""
        key = (USERS, user_id)
        entries = [self._own.get(key), *(node.entries.get(key) for node in self._nodes.values())]
        return sum(entry.connections for entry in entries if entry is not None)

    def version(self, place: int, id: int) -> int:
        return self._versions.get((place, id), 0)

    # This node's own: synchronous.

    def arrive(self, place: int, id: int) -> None:
        key = (place, id)
        if entry := self._own.get(key):
            entry.connections += 1
            entry.version = self._next_version(key)
        else:
            self._own[key] = _Entry(1, self._next_version(key))
            self._count(key, 1, self._own[key].version, ours=True)
        self._tell_soon(key)

    def leave(self, place: int, id: int) -> None:
        key = (place, id)
        entry = self._own[key]
        entry.connections -= 1
        entry.version = self._next_version(key)
        if not entry.connections:
            del self._own[key]
            self._count(key, -1, entry.version, ours=True)
        self._tell_soon(key)

    def _next_version(self, key: Key) -> int:
        version = self._versions[key] = max(self._versions.get(key, 0) + 1, _milliseconds())
        return version

    def _count(self, key: Key, by: int, version: int, *, ours: bool) -> None:
        """One node more, or less, has it."""
        place, id = key
        here = self._present.setdefault(place, {})
        before = here.get(id, 0)
        if before + by:
            here[id] = before + by
        else:
            del here[id]
            if not here:
                del self._present[place]
        if bool(before) != bool(before + by):
            known = self._versions.get(key, 0)
            self._versions[key] = version = max(version, known if ours else known + 1)
            for watcher in self.watchers:
                watcher(Transition(place, id, bool(before + by), version, ours))

    # Other nodes.

    def hear(self, signal: Present) -> None:
        if signal.node == self._node:
            return
        node = self._nodes.get(signal.node)
        if node is None:
            node = self._nodes[signal.node] = _Node(0.0, {})
        node.heard_at = trio.current_time()
        round, part, parts = signal.whole or (node.round, 0, 0)
        if round != node.round:
            node.round, node.parts = round, 0
        for place, id, connections, version in signal.entries:
            self._apply(node, (place, id), connections, version)
        if signal.whole:
            node.parts += 1
            if part == parts - 1 == node.parts - 1:  # none of them was lost: what they did not name has gone
                self._drop(node, [key for key, entry in node.entries.items() if entry.round != round])

    def _apply(self, node: _Node, key: Key, connections: int, version: int) -> None:
        entry = node.entries.get(key)
        if entry is None:
            entry = node.entries[key] = _Entry(0, 0)
        entry.round = node.round
        if version < entry.version:
            return
        before, entry.connections, entry.version = entry.connections, connections, version
        if bool(before) != bool(connections):
            self._count(key, 1 if connections else -1, version, ours=False)

    def _drop(self, node: _Node, keys: Sequence[Key], *, ours: bool = False) -> None:
        for key in keys:
            if node.entries.pop(key).connections:
                self._count(key, -1, self._versions.get(key, 0) + 1, ours=ours)

    def _forget_silent(self) -> None:
        """Of those that are left the first by name tells the world of who has gone with a node."""
        now = trio.current_time()
        silent = [name for name, node in self._nodes.items() if now - node.heard_at > FORGET]
        first = self._node <= min([self._node, *(self._nodes.keys() - set(silent))])
        for name in silent:
            node = self._nodes.pop(name)
            self._drop(node, list(node.entries), ours=first)

    # Telling.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        told_all = -TELL_ALL
        while True:
            if trio.current_time() - told_all >= TELL_ALL:
                told_all = trio.current_time()
                await self._tell_all()
                self._forget_silent()
                self._forget_versions()
            with trio.move_on_at(told_all + TELL_ALL):
                await self._wake.wait()
                await trio.sleep(GATHER)
            self._wake = trio.Event()
            self._tell_changed()

    def _tell_soon(self, key: Key) -> None:
        if self._tell is not None:
            self._untold[key] = None
            self._wake.set()

    def _tell_changed(self) -> None:
        untold, self._untold = list(self._untold), {}
        for part in _parts(untold):
            self._say([self._as_told(key) for key in part], None)

    async def _tell_all(self) -> None:
        if self._tell is None:
            return
        self._round += 1
        parts = list(_parts(list(self._own))) or [[]]
        for number, part in enumerate(parts):
            self._say([self._as_told(key) for key in part], (self._round, number, len(parts)))
            await trio.lowlevel.checkpoint()

    def _as_told(self, key: Key) -> tuple[int, int, int, int]:
        entry = self._own.get(key)
        return (*key, entry.connections if entry else 0, entry.version if entry else self._versions.get(key, 0))

    def _say(self, entries: list[tuple[int, int, int, int]], whole: tuple[int, int, int] | None) -> None:
        assert self._tell is not None
        self._tell(Present(self._node, entries, whole))

    def _forget_versions(self) -> None:
        old = _milliseconds() - REMEMBER
        for key, version in list(self._versions.items()):
            if version < old and key not in self._untold and not self.has(*key):
                del self._versions[key]
        for node in self._nodes.values():
            for key, entry in list(node.entries.items()):
                if not entry.connections and entry.version < old:
                    del node.entries[key]


def _parts(keys: list[Key]) -> Iterator[list[Key]]:
    for start in range(0, len(keys), PART):
        yield keys[start : start + PART]


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
