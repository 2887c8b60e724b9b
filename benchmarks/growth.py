"""H: what the same thing costs where there is a hundred times as much, and a thousand times."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.audience import Failure
from benchmarks.daemons import Pinned, tell
from benchmarks.fan import stage
from benchmarks.results import Results
from benchmarks.subjects import Daemon, Subject
from tests.daemon import TOKEN

DELIVERY, JOIN, POST = "CPU per delivery", "CPU to let one in", "CPU per post"
FEW, MANY = 100, 10_000  # clients
MESSAGES = 20
DELIVERIES_A_SECOND = 25_000  # so that neither end is busy all the time
JOINERS = 500
SETTLE = 0.5  # seconds
POSTS = 500  # of a round
LITTLE = 10_000  # messages that are stored already
ROOM_MESSAGES = 1000  # of one conversation

# As chatd would have stored them, room by room.
_FILL = """
    WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n WHERE x + 1 < :count)
    INSERT INTO {table} SELECT {columns} FROM n
"""
_MOMENT = "'2026-01-01 00:00:00.000000'"
_ROOM, _SEQ = f"x / {ROOM_MESSAGES} + 1", f"x % {ROOM_MESSAGES} + 1"
_MESSAGES = (
    "chat_messages (id, chat_conversation_id, user_id, type, content, created_at, updated_at, seq, client_id,"
    " request_hash)"
)
_MESSAGE = f"x + 1, {_ROOM}, 1, 'text', 'a message of some length, as people write it', {_MOMENT}, {_MOMENT},"
_KEY = f" {_SEQ}, printf('%08d', x), x'00000000000000000000000000000000'"


def deliveries(results: Results, subject: Subject, core: int, rounds: int) -> None:
    """In a room of a hundred, and of ten thousand."""
    with ExitStack() as stack:
        stages = {}
        for size in (FEW, MANY):
            tell(f"growth: a room of {size:,} of {subject.name}")
            stages[size] = stack.enter_context(stage(subject, core))
            stages[size].fill(size)
            stages[size].send(5, size / DELIVERIES_A_SECOND)
        for number in range(rounds):
            for size, one in stages.items():
                tell(f"growth: {subject.name}, a room of {size:,}, round {number + 1} of {rounds}")
                cpu, _ = one.send(MESSAGES, size / DELIVERIES_A_SECOND)
                results.add("H", DELIVERY, f"{subject.name}, {size:,} in the room", "µs", cpu * 1e6)


def joins(results: Results, core: int, rounds: int) -> None:
    """With a hundred there, and ten thousand."""
    for number in range(rounds):
        with stage(Daemon(), core) as one:
            for size in (FEW, MANY):
                tell(f"growth: joining {size:,} others, round {number + 1} of {rounds}")
                one.fill(size)
                time.sleep(SETTLE)
                before = one.service.cpu()
                one.fill(size + JOINERS)
                used = one.service.cpu() - before
                results.add("H", JOIN, f"{size:,} connections", "ms", used / JOINERS * 1e3)


def posts(results: Results, core: int, directory: Path, much: int, rounds: int) -> None:
    """With ten thousand messages stored, and ten million."""
    with ExitStack() as stack:
        nodes = {count: stack.enter_context(_filled(directory, core, count)) for count in (LITTLE, much)}
        for number in range(rounds):
            for count, node in nodes.items():
                tell(f"growth: posts beside {count:,} messages, round {number + 1} of {rounds}")
                results.add("H", POST, f"{count:,} stored", "µs", _post(node, count) * 1e6)


@contextmanager
def _filled(directory: Path, core: int, count: int) -> Iterator[Pinned]:
    place = directory / str(count)
    place.mkdir()
    node = Pinned(place, core)
    try:
        node.start()  # which makes the tables
        node.stop()
        tell(f"growth: storing {count:,} messages")
        _fill(place / "chatd.db", count)
        node.start()
        _post(node, count)
        yield node
    finally:
        node.close()


def _fill(path: Path, count: int) -> None:
    rooms = count // ROOM_MESSAGES
    with closing(sqlite3.connect(path, isolation_level=None)) as connection, connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN")
        for table, columns, rows in (
            ("chat_conversations", f"x + 1, {ROOM_MESSAGES}, 0, 1, {_MOMENT}, NULL, NULL", rooms),
            ("chat_members", f"x + 1, 1, 'active', NULL, NULL, {_MOMENT}", rooms),
            (_MESSAGES, _MESSAGE + _KEY, count),
            ("chat_changes", f"{_ROOM}, {_SEQ}, 'created', x + 1, NULL", count),
        ):
            connection.execute(_FILL.format(table=table, columns=columns), {"count": rows})
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _post(node: Pinned, count: int) -> float:
    """CPU seconds of one post, to any of the rooms."""
    http = HTTPConnection("127.0.0.1", node.api_port)
    before = node.cpu()
    for number in range(POSTS):
        room = random.randrange(count // ROOM_MESSAGES) + 1
        body: dict[str, Any] = {"conversation_id": room, "sender_id": 1, "content": "x" * 60}
        body["client_id"] = f"{time.monotonic_ns()}-{number}"
        http.request("POST", "/api/ws/messages", msgspec.json.encode(body), {"X-Internal-Token": TOKEN})
        answer = http.getresponse()
        if answer.read() and answer.status != 200:
            raise Failure(f"a post was answered with {answer.status}")
    http.close()
    return (node.cpu() - before) / POSTS
